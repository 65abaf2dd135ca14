"""A linear layer's weight in 8 or 4 bits on a GPU, and the products with it: launches quantized_kernels.py.

Codes of 8 bits lie as rows of bytes, filled up to whole planes. With 4 bits a row consists of blocks of `2 * PLANE`
inputs in `PLANE` bytes, the first half of a block in the low four bits:

    byte       0      1    ...  P-1  |   P      P+1  ...  2P-1
    low        0      1    ...  P-1  |  2P     2P+1  ...  3P-1
    high       P     P+1   ... 2P-1  |  3P     3P+1  ...  4P-1

So both halves of a tile of bytes are tiles of successive inputs, which products need, without any exchange between
threads. Scales and offsets of groups are float16 and lie with successive outputs side by side; each output has a
factor, a power of two, by which they fit: scales that a checkpoint has in 16 bits stay exact.
"""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from tidewright.devices.cuda import quantized_kernels as kernels
from tidewright.devices.cuda.launch import Launch, start
from tidewright.devices.cuda.quantized_launch import (
    WeightLayout,
    count_splits,
    layout_of,
    product_launch,
    quantize_launch,
    read_launch,
    sum_launch,
)
from tidewright.quantization.affine import AffineWeight, QuantizationError
from tidewright.quantization.half_scales import as_halves
from tidewright.quantization.input_order import InputOrder

_INTERPRETED_PROCESSORS = 4
_LARGEST_EXPONENT = 7  # of a row's scales, divided by its factor: products with codes must not exceed float16, either


@dataclass(frozen=True)
class CudaQuantizedWeight:
    """Of F outputs and `depth` inputs."""

    layout: WeightLayout
    codes_FB: torch.Tensor
    """int8."""
    scales_GF: torch.Tensor | None
    """float16, as the offsets."""
    offsets_GF: torch.Tensor | None
    factors_F: torch.Tensor
    """float32; without scales of groups, the scales themselves."""
    depth: int
    """Columns: the inputs, unless there is an `order`."""
    group: int
    order: InputOrder | None = None

    @property
    def features(self) -> int:
        return self.codes_FB.shape[0]

    @property
    def nbytes(self) -> int:
        tensors = (self.codes_FB, self.scales_GF, self.offsets_GF, self.factors_F)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def multiply(
        self, x_TE: torch.Tensor, bias_F: torch.Tensor | None = None, out_TF: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x w^T + bias, summed in float32. `out_TF` may be some columns of a wider tensor."""
        if out_TF is None:
            out_TF = x_TE.new_empty((len(x_TE), self.features))
        if self.order:
            x_TE = self.order.gather(x_TE)
        _product(self, x_TE, None, bias_F, out_TF)
        return out_TF

    def multiply_quantized(
        self, tokens: QuantizedTokens, bias_F: torch.Tensor | None, out_TF: torch.Tensor
    ) -> torch.Tensor:
        """The same in integers, which are exact. For weights with one scale per output, see `takes_integers`."""
        assert self.takes_integers
        _product(self, tokens.codes_TE, tokens.scales_T, bias_F, out_TF)
        return out_TF

    @property
    def takes_integers(self) -> bool:
        """Tensor cores multiply 32 integers at a time."""
        return self.layout.bits == 8 and not self.layout.has_scales and self.layout.plane >= 32

    def read_rows(self, ids_T: torch.Tensor, out_TE: torch.Tensor) -> torch.Tensor:
        """Dequantized rows of a weight without an order. Ids that it does not have leave their rows of `out_TE` as they
        are.
        """
        launch = read_launch(self.layout, self.depth)
        if len(ids_T):
            start(
                kernels.read_kernel,
                (len(ids_T), -(-self.depth // launch.constants["TILE"])),
                launch,
                out_TE,
                ids_T,
                *self._tensors,
                self.features,
                self.depth,
                self.group,
                self.codes_FB.stride(0),
                out_TE.stride(0),
            )
        return out_TE

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        unused = self.factors_F
        return (
            self.codes_FB,
            unused if self.scales_GF is None else self.scales_GF,
            unused if self.offsets_GF is None else self.offsets_GF,
            self.factors_F,
        )


@dataclass(frozen=True)
class QuantizedTokens:
    """Activations in 8 bits, a scale per token."""

    codes_TE: torch.Tensor
    scales_T: torch.Tensor


def quantize_tokens(x_TE: torch.Tensor, dtype: torch.dtype = torch.int8) -> QuantizedTokens:
    """`dtype` of the codes: int8 or float8_e4m3fn."""
    assert x_TE.stride(1) == 1
    rows, size = x_TE.shape
    codes_TE = torch.empty((rows, size), dtype=dtype, device=x_TE.device)
    scales_T = torch.empty(rows, dtype=torch.float32, device=x_TE.device)
    if rows:
        start(kernels.quantize_kernel, (rows,), quantize_launch(size), x_TE, codes_TE, scales_T, size, x_TE.stride(0))
    return QuantizedTokens(codes_TE, scales_T)


def layout_for(weight: AffineWeight) -> WeightLayout | None:
    """None: the kernels don't take such a weight."""
    if weight.is_float:
        return None
    depth = weight.codes_FE.shape[1]
    has_scales = weight.group_size < depth or weight.bits == 4 or weight.offsets_FG is not None
    zero = 8 if weight.bits == 4 and bool((weight.codes_FE < 0).any()) else 0
    return layout_of(weight.bits, weight.group_size, depth, zero, has_scales, weight.offsets_FG is not None)


def pack(weight: AffineWeight, device: torch.device) -> CudaQuantizedWeight:
    """Raises QuantizationError: the kernels don't take such a weight."""
    layout, depth = layout_for(weight), weight.codes_FE.shape[1]
    if layout is None:
        raise QuantizationError(f"no kernel takes {weight.bits} bits in groups of {weight.group_size}")
    codes_FE = F.pad(weight.codes_FE.to(device), (0, -depth % layout.block), value=-layout.zero)
    if layout.bits == 4:
        low_FBP, high_FBP = (codes_FE + layout.zero).unflatten(1, (-1, 2, layout.plane)).unbind(2)
        if int((low_FBP | high_FBP).max()) > 15 or int((low_FBP | high_FBP).min()) < 0:
            raise QuantizationError("codes of 4 bits are -8 to 7 or 0 to 15")
        codes_FE = (low_FBP | (high_FBP << 4)).flatten(1)
    scales_FG = weight.scales_FG.to(device)
    group = min(weight.group_size, depth)
    if not layout.has_scales:
        factors_F = scales_FG[:, 0].contiguous()
        return CudaQuantizedWeight(layout, codes_FE.contiguous(), None, None, factors_F, depth, group)
    offsets_FG = None if weight.offsets_FG is None else weight.offsets_FG.to(device)
    # An offset is a scale times a zero point, at most 15 with 4 bits.
    factors_F, *halves = as_halves(scales_FG, offsets_FG, _LARGEST_EXPONENT, 1 / 16)
    scales_GF, offsets_GF = (None if values is None else values.T.contiguous() for values in halves)
    order = weight.order and replace(weight.order, inputs_E=weight.order.inputs_E.to(device))
    return CudaQuantizedWeight(layout, codes_FE.contiguous(), scales_GF, offsets_GF, factors_F, depth, group, order)


def _product(
    weight: CudaQuantizedWeight,
    x_TE: torch.Tensor,
    token_scales_T: torch.Tensor | None,
    bias_F: torch.Tensor | None,
    out_TF: torch.Tensor,
) -> None:
    rows, depth = x_TE.shape
    features = weight.features
    assert depth == weight.depth, f"x has rows of {depth}, the weight of {weight.depth}"
    assert x_TE.stride(1) == 1
    assert out_TF.shape == (rows, features)
    assert out_TF.stride(1) == 1
    if not rows:
        return
    splits = count_splits(features, depth, rows, _processors(x_TE.device))
    launch = product_launch(weight.layout, x_TE.dtype.itemsize, rows, splits)
    launch = _with_bias(launch, bias_F)
    sums = out_TF
    if splits > 1:
        dtype = torch.float32 if token_scales_T is None else torch.int32
        sums = torch.empty((splits, rows, features), dtype=dtype, device=x_TE.device)
    unused = weight.factors_F
    ends = (unused if token_scales_T is None else token_scales_T, unused if bias_F is None else bias_F)
    tiles = -(-rows // launch.constants["T"]) * -(-features // launch.constants["F"])
    start(
        kernels.product_kernel,
        (tiles, splits),
        launch,
        sums,
        x_TE,
        *weight._tensors,
        *ends,
        rows,
        features,
        depth,
        weight.group,
        x_TE.stride(0),
        weight.codes_FB.stride(0),
        out_TF.stride(0),
    )
    if splits > 1:
        launch = _with_bias(sum_launch(splits), bias_F)
        grid = (rows, -(-features // launch.constants["F"]))
        start(kernels.sum_kernel, grid, launch, out_TF, sums, unused, *ends, features, out_TF.stride(0))


def _with_bias(launch: Launch, bias_F: torch.Tensor | None) -> Launch:
    return launch._replace(constants=launch.constants | {"HAS_BIAS": bias_F is not None})


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
