"""A quantized weight on the disk: what all formats have in common, whatever their codes are packed in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from tidewright.layers.weights import WeightSlice
from tidewright.quantization.affine import AffineWeight, QuantizationError, groups_of_columns
from tidewright.quantization.input_order import by_group

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""codes_FE, scales_FG and offsets_FG of a part of a weight."""


class StoredWeight(ABC):
    """An `AffineSource`."""

    def __init__(
        self, name: str, shape: tuple[int, int], bits: int, group_size: int, groups_E: torch.Tensor | None = None
    ) -> None:
        """`groups_E`: of each input its group; None: a group is as many inputs in a row."""
        self.name, self.shape, self.bits, self.group_size = name, shape, bits, group_size
        self._groups_E = groups_E

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def cut(self, rows: slice, columns: slice) -> AffineWeight:
        """Raises QuantizationError: a group of neighbouring inputs would be cut, or a scale is no number."""
        if self._groups_E is not None:
            return self._ordered(rows, columns, self._groups_E)
        groups = groups_of_columns(self.shape[1], self.group_size, columns.start, columns.stop)
        codes_FE, scales_FG, offsets_FG = self._read(rows, columns, groups)
        check_finite(self.name, scales_FG, offsets_FG)
        size = min(self.group_size, columns.stop - columns.start)
        return AffineWeight(codes_FE, scales_FG, offsets_FG, self.bits, size)

    def _ordered(self, rows: slice, columns: slice, groups_E: torch.Tensor) -> AffineWeight:
        order, groups_G, size = by_group(groups_E[columns], self.group_size, self.bits)
        codes_FE, scales_FG, offsets_FG = self._read(rows, columns, slice(0, -(-self.shape[1] // self.group_size)))
        check_finite(self.name, scales_FG, offsets_FG)
        # Columns that only fill up a group have codes like any other: they are multiplied by nothing.
        codes_FE = codes_FE[:, order.inputs_E.clamp(min=0)]
        offsets_FG = None if offsets_FG is None else offsets_FG[:, groups_G]
        return AffineWeight(codes_FE, scales_FG[:, groups_G], offsets_FG, self.bits, size, order)

    @abstractmethod
    def _read(self, rows: slice, columns: slice, groups: slice) -> Parts: ...


def check_finite(name: str, *numbers: torch.Tensor | None) -> None:
    """Raises QuantizationError."""
    if not all(some is None or some.isfinite().all() for some in numbers):
        raise QuantizationError(f"{name} has scales that are not finite; the file is damaged")


def with_zero_points(unsigned_FE: torch.Tensor, scales_FG: torch.Tensor, zeros_FG: torch.Tensor, bits: int) -> Parts:
    """Of weights that are scale * (code - zero), with codes from 0 on."""
    shift = 0 if bits == 4 else 128  # int8 holds 0...255 as -128...127
    return signed(unsigned_FE, shift), scales_FG, scales_FG * (shift - zeros_FG.float())


def signed(unsigned_FE: torch.Tensor, zero: int) -> torch.Tensor:
    """The codes less their common zero point, as int8."""
    return (unsigned_FE.to(torch.int16) - zero).to(torch.int8)


def modules(tensors: Mapping[str, WeightSlice]) -> dict[str, dict[str, WeightSlice]]:
    """By layer, what its tensors are called there."""
    found: dict[str, dict[str, WeightSlice]] = {}
    for name, tensor in tensors.items():
        module, _, own = name.rpartition(".")
        found.setdefault(module, {})[own] = tensor
    return found


def expect_parts(module: str, parts: Mapping[str, WeightSlice], *names: str) -> None:
    """Raises QuantizationError: one is not there."""
    if missing := sorted(set(names) - parts.keys()):
        raise QuantizationError(f"{module} lacks {', '.join(missing)}")


def expect_shape(name: str, tensor: WeightSlice, *shape: int) -> None:
    """Raises QuantizationError."""
    if tuple(tensor.get_shape()) != shape:
        raise QuantizationError(f"{name} has shape {tuple(tensor.get_shape())}, expected {shape}")


def size_of_groups(name: str, in_features: int, groups: int, said: object = None) -> int:
    """Of so many groups, the last of which may be smaller than `said`; or all equal, if the configuration says nothing.

    Raises QuantizationError.
    """
    if isinstance(said, int) and said > 0:
        if groups != -(-in_features // said):
            raise QuantizationError(
                f"{name} has {groups} scales for {in_features} inputs, but config.json says groups of {said}"
            )
        return min(said, in_features)
    if groups < 1 or in_features % groups:
        raise QuantizationError(f"{name}: {in_features} inputs can't be {groups} groups of one size")
    return in_features // groups


def two_sizes(name: str, tensor: WeightSlice) -> tuple[int, int]:
    """The shape of a matrix that isn't empty. Raises QuantizationError."""
    shape = tensor.get_shape()
    if len(shape) != 2 or min(shape) < 1:
        raise QuantizationError(f"{name} has shape {tuple(shape)}, expected two dimensions")
    return shape[0], shape[1]


def order_of(name: str, tensor: WeightSlice, in_features: int, group_size: int) -> torch.Tensor | None:
    """Of each input its group, where a group is not as many inputs in a row. Raises QuantizationError."""
    expect_shape(name, tensor, in_features)
    groups_E = tensor[(slice(None),)]
    if groups_E.is_floating_point() or groups_E.is_complex():
        raise QuantizationError(f"{name} is stored as {groups_E.dtype}, expected whole numbers")
    groups_E, groups = groups_E.long(), -(-in_features // group_size)
    # Some writers leave it all zero if columns are in their order.
    if not groups_E.any() or torch.equal(groups_E, torch.arange(in_features) // group_size):
        return None
    least, most = (int(number) for number in groups_E.aminmax())
    if least < 0 or most >= groups:
        raise QuantizationError(f"{name} names group {least if least < 0 else most}, but there are {groups}")
    return groups_E
