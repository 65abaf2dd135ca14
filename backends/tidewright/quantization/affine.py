"""What a quantized weight is, whatever file it comes from: small codes, and scales that groups of inputs share.

Readers of checkpoint formats make an `AffineWeight`; a device's linear method packs it for its kernels.
"""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from tidewright.quantization.input_order import InputOrder

_LARGEST_E4M3 = 448.0
_CHUNK = 1 << 22  # weights that are rounded at once: it takes several times their memory
_CODES = {torch.int8, torch.float8_e4m3fn}
# What the largest absolute value of a group is divided by: which is best depends on how the others lie.
_DIVISORS_INT4 = (7.0, 7.5, 8.0)


class QuantizationError(ValueError):
    """A quantized weight is malformed, or is not to be cut or held like this. The message says what would do."""


@dataclass(frozen=True)
class Scheme:
    """How weights and activations are quantized."""

    name: str
    weight_bits: int
    group_size: int = 0
    """Inputs that share a scale; 0: all, one scale per output channel."""
    symmetric: bool = True
    activation_bits: int = 0
    """8: one scale per token, found as it is computed; 0: activations are not quantized."""
    is_float: bool = False
    """Codes are float8 e4m3 instead of integers."""


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 8),
        Scheme("w8a8", 8, activation_bits=8),
        Scheme("int4-g32", 4, 32, symmetric=False),
        Scheme("int4-g64", 4, 64, symmetric=False),
        Scheme("int4-g128", 4, 128, symmetric=False),
        Scheme("fp8", 8, is_float=True),
    )
}


def scheme_named(name: str) -> Scheme:
    """Raises QuantizationError."""
    if name not in SCHEMES:
        raise QuantizationError(f"quantization {name!r} does not exist; use one of: {', '.join(SCHEMES)}")
    return SCHEMES[name]


@dataclass(frozen=True)
class AffineWeight:
    """Of one linear layer, F outputs by E inputs, or a rank's cut of it. With an `order`, E are columns.

    w[f, e] = scales[f, e // group_size] * codes[f, e] + offsets[f, e // group_size]. The last group may be shorter.
    """

    codes_FE: torch.Tensor
    """int8, one code a byte: -128...127 for 8 bits, 0...15 or -8...7 for 4 bits. Or float8_e4m3fn."""
    scales_FG: torch.Tensor
    """float32."""
    offsets_FG: torch.Tensor | None
    """float32; None: symmetric. With a zero point, offset = -scale * zero."""
    bits: int
    """4 or 8; codes of 5 and 6 bits are held as 8."""
    group_size: int
    """Inputs that share a scale; the number of inputs: one scale per output channel."""
    order: InputOrder | None = None
    """None: the columns are the inputs."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group_size < 1 or self.codes_FE.dim() != 2:
            raise QuantizationError(f"no weight has {self.bits} bits in groups of {self.group_size}; bits are 4 or 8")
        if self.codes_FE.dtype not in _CODES or (self.bits == 4 and self.is_float):
            raise QuantizationError(f"codes are int8, or float8_e4m3fn of 8 bits, not {self.codes_FE.dtype}")
        features, depth = self.codes_FE.shape
        expected = (features, -(-depth // self.group_size))
        for name, tensor in (("scales", self.scales_FG), ("offsets", self.offsets_FG)):
            if tensor is not None and (tuple(tensor.shape) != expected or tensor.dtype != torch.float32):
                found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise QuantizationError(f"{name} must be float32 of shape {expected}, not {found}")

    @property
    def is_float(self) -> bool:
        return self.codes_FE.dtype == torch.float8_e4m3fn

    def get_shape(self) -> list[int]:
        features, depth = self.codes_FE.shape
        return [features, self.order.count if self.order else depth]

    def dequantized(self) -> torch.Tensor:
        """float32; columns are the inputs."""
        depth = self.codes_FE.shape[1]
        weight_FE = self.codes_FE.float() * _spread(self.scales_FG, self.group_size, depth)
        if self.offsets_FG is not None:
            weight_FE += _spread(self.offsets_FG, self.group_size, depth)
        return self.order.scatter(weight_FE) if self.order else weight_FE

    def rows(self, first: int, last: int) -> AffineWeight:
        """Outputs from `first` up to, not including, `last`."""
        return replace(
            self,
            codes_FE=self.codes_FE[first:last],
            scales_FG=self.scales_FG[first:last],
            offsets_FG=None if self.offsets_FG is None else self.offsets_FG[first:last],
        )

    def columns(self, first: int, last: int) -> AffineWeight:
        """Inputs from `first` up to, not including, `last`. Raises QuantizationError: a group would be cut."""
        if self.order:
            if (first, last) != (0, self.order.count):
                raise QuantizationError("columns that are not in the order of inputs can't be cut")
            return self
        depth, size = self.codes_FE.shape[1], self.group_size
        groups = groups_of_columns(depth, size, first, last)
        return replace(
            self,
            codes_FE=self.codes_FE[:, first:last],
            scales_FG=self.scales_FG[:, groups],
            offsets_FG=None if self.offsets_FG is None else self.offsets_FG[:, groups],
            group_size=last - first if size >= depth else size,
        )

    def cut(self, rows: slice, columns: slice) -> AffineWeight:
        """As an `AffineSource`. Raises QuantizationError: a group would be cut."""
        return self.rows(rows.start, rows.stop).columns(columns.start, columns.stop)


@runtime_checkable
class AffineSource(Protocol):
    """A quantized weight that may still be on disk; a loader gets it in place of a plain tensor's `WeightSlice`."""

    def get_shape(self) -> list[int]:
        """[F, E] of the whole weight."""
        ...

    def cut(self, rows: slice, columns: slice) -> AffineWeight:
        """Only that part, read from disk. Start and stop are set. Raises QuantizationError: a group would be cut.

        `groups_of_columns` checks that, and says which groups to read.
        """
        ...


def groups_of_columns(depth: int, group_size: int, first: int, last: int) -> slice:
    """The groups that columns `first` to `last` of a weight with `depth` inputs consist of.

    Raises QuantizationError: a group would be cut.
    """
    if group_size >= depth:
        return slice(0, 1)
    if first % group_size or (last % group_size and last != depth):
        groups = -(-depth // group_size)
        sizes = ", ".join(str(size) for size in range(1, groups + 1) if groups % size == 0)
        raise QuantizationError(
            f"{depth} inputs in groups of {group_size} can't be cut from {first} to {last}, which is within a group; "
            f"groups of {group_size} divide among {sizes} ranks"
        )
    return slice(first // group_size, -(-last // group_size))


def joined(parts: Sequence[AffineWeight]) -> AffineWeight:
    """Weights of one format, one after the other as rows of one weight."""
    first = parts[0]
    if len(parts) == 1:
        return first
    offsets = [part.offsets_FG for part in parts if part.offsets_FG is not None]
    return replace(
        first,
        # Which takes no float8.
        codes_FE=torch.cat([part.codes_FE.view(torch.int8) for part in parts]).view(first.codes_FE.dtype),
        scales_FG=torch.cat([part.scales_FG for part in parts]),
        offsets_FG=torch.cat(offsets) if offsets else None,
    )


def quantize_rtn(weight_FE: torch.Tensor, scheme: Scheme) -> AffineWeight:
    """Each weight rounded to the nearest code of its group. Raises QuantizationError: one is not finite."""
    rows = max(1, _CHUNK // weight_FE.shape[1])
    return joined([_rounded(part_FE, scheme) for part_FE in weight_FE.split(rows)])


def _rounded(weight_FE: torch.Tensor, scheme: Scheme) -> AffineWeight:
    depth = weight_FE.shape[1]
    size = min(scheme.group_size or depth, depth)
    if not weight_FE.isfinite().all():  # which codes would hide
        raise QuantizationError("it has numbers that are not finite; the file is damaged")
    # The last group is filled up by its own last value, which changes neither its smallest nor its largest.
    filled_FE = weight_FE.float()
    filled_FE = torch.cat([filled_FE, filled_FE[:, -1:].expand(-1, -depth % size)], dim=1)
    groups_FGS = filled_FE.unflatten(1, (-1, size))
    if scheme.is_float:
        scales_FG1 = _nonzero(groups_FGS.abs().amax(2, keepdim=True) / _LARGEST_E4M3)
        codes = (groups_FGS / scales_FG1).to(torch.float8_e4m3fn).view(torch.int8)
        codes_FE = codes.flatten(1)[:, :depth].contiguous().view(torch.float8_e4m3fn)
        return AffineWeight(codes_FE, scales_FG1[..., 0], None, 8, size)
    if scheme.symmetric:
        scales_FG1, codes_FGS, offsets_FG = *_symmetric(groups_FGS, scheme.weight_bits), None
    else:
        scales_FG1, codes_FGS, offsets_FG = _asymmetric(groups_FGS, scheme.weight_bits)
    codes_FE = codes_FGS.to(torch.int8).flatten(1)[:, :depth].contiguous()
    return AffineWeight(codes_FE, scales_FG1[..., 0].contiguous(), offsets_FG, scheme.weight_bits, size)


def _symmetric(groups_FGS: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    largest_FG1 = groups_FGS.abs().amax(2, keepdim=True)
    if bits == 8:
        scales_FG1 = _nonzero(largest_FG1 / 127)
        return scales_FG1, (groups_FGS / scales_FG1).round_().clamp_(-127, 127)
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    errors_FG1 = torch.empty(0)
    for divisor in _DIVISORS_INT4:
        scales_FG1 = _nonzero(largest_FG1 / divisor)
        codes_FGS = (groups_FGS / scales_FG1).round_().clamp_(-8, 7)
        new_FG1 = (codes_FGS * scales_FG1).sub_(groups_FGS).square_().sum(2, keepdim=True)
        if best is None:
            best, errors_FG1 = (scales_FG1, codes_FGS), new_FG1
            continue
        better_FG1 = new_FG1 < errors_FG1
        best = torch.where(better_FG1, scales_FG1, best[0]), torch.where(better_FG1, codes_FGS, best[1])
        errors_FG1 = torch.minimum(new_FG1, errors_FG1)
    assert best
    return best


def _asymmetric(groups_FGS: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With a whole zero point, so that 0 stays 0 and formats that store zero points can hold it."""
    most = 2**bits - 1
    least_FG1 = groups_FGS.amin(2, keepdim=True).clamp_(max=0)
    largest_FG1 = groups_FGS.amax(2, keepdim=True).clamp_(min=0)
    scales_FG1 = _nonzero((largest_FG1 - least_FG1) / most)
    zeros_FG1 = (-least_FG1 / scales_FG1).round_().clamp_(0, most)
    codes_FGS = (groups_FGS / scales_FG1).round_().add_(zeros_FG1).clamp_(0, most)
    shift = 0 if bits == 4 else 128  # int8 holds 0...255 as -128...127
    offsets_FG = ((shift - zeros_FG1) * scales_FG1)[..., 0].contiguous()
    return scales_FG1, codes_FGS - shift, offsets_FG


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    """A group of zeros has scale 1, so that nothing divides by 0."""
    return torch.where(scales > torch.finfo(torch.float32).tiny, scales, 1.0)


def _spread(values_FG: torch.Tensor, group_size: int, depth: int) -> torch.Tensor:
    """[F, E]: each input's value, which is its group's."""
    return values_FG.repeat_interleave(min(group_size, depth), dim=1)[:, :depth]
