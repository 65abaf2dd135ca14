"""A linear layer's weight in few bits on a GPU, packed for the products as soon as all its parts are loaded.

What no product takes is dequantized, and so is a layer of which a part is not quantized. A log line says which.
"""

from __future__ import annotations

import functools
import itertools
import logging

import torch

from tidewright.devices.cuda import float8_weight
from tidewright.devices.cuda.float8_weight import Float8Weight, multiplies_float8, pack_float8
from tidewright.devices.cuda.quantized_launch import TOKEN_TILES
from tidewright.devices.cuda.quantized_weight import CudaQuantizedWeight, layout_for, pack, quantize_tokens
from tidewright.distributed.sharding import Cut
from tidewright.layers.gathered_linear import GatheredLinear, Part, dequantized
from tidewright.layers.linear_method import PlainLinear, read_part
from tidewright.layers.weights import WeightSlice
from tidewright.quantization.affine import AffineWeight, Scheme, joined, quantize_rtn
from tidewright.quantization.choice import Quantization

log = logging.getLogger(__name__)


class CudaQuantizedLinear(GatheredLinear):
    def __init__(
        self,
        out_features: int,
        in_features: int,
        quantization: Quantization,
        is_head: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(out_features, in_features, quantization.scheme_of(is_head), is_head)
        self._device, self._dtype = device, dtype
        scheme = quantization.scheme
        # A head has few rows, and takes as long as its weight is read, whatever the activations are.
        self._quantizes_tokens = scheme is not None and scheme.activation_bits == 8 and not is_head
        self.pending_bytes = int(out_features * in_features * _bits(scheme, device, dtype) / 8)
        self._compiles = device.type == "cuda"
        self._weights: list[CudaQuantizedWeight | Float8Weight] = []
        self._plain: PlainLinear | None = None

    def read(self, source: WeightSlice, rows: Cut, columns: Cut) -> Part:
        """What is to be quantized is so on the GPU, which is faster."""
        part = read_part(source, rows, columns, None)
        if isinstance(part, AffineWeight) or not self.scheme:
            return part
        return quantize_rtn(part.to(self._device), self.scheme)

    def take(self, parts: list[Part]) -> None:
        self.pending_bytes = 0
        if reason := _obstacle(parts, self._device):
            _warn_once(reason)
            with self._device:
                self._plain = PlainLinear(*self.shape).to(self._dtype)
            self._plain.weight.copy_(dequantized(parts, self._dtype))
            return
        weights = [part for part in parts if isinstance(part, AffineWeight)]
        for _, some in itertools.groupby(weights, _format):
            weight = joined(list(some))
            self._weights.append((pack_float8 if weight.is_float else pack)(weight, self._device))

    @torch.inference_mode()
    def finish(self) -> None:
        """Compiles the kernels for all numbers of rows, unless another layer has them: steps at the start have few
        rows for the head, which may have a format of its own.
        """
        if self._compiles and self._weights:
            for rows in TOKEN_TILES:
                self.multiply(torch.zeros((rows, self.shape[1]), dtype=self._dtype, device=self._device), None)

    def multiply(self, x_TE: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        if self._plain:
            return self._plain.multiply(x_TE, bias_F)
        out_TF = x_TE.new_empty((len(x_TE), self.shape[0]))
        tokens = None
        first = 0
        for weight in self._weights:
            own = slice(first, first + weight.features)
            bias = None if bias_F is None else bias_F[own]
            if self._quantizes_tokens and isinstance(weight, CudaQuantizedWeight) and weight.takes_integers:
                tokens = tokens or quantize_tokens(x_TE)
                weight.multiply_quantized(tokens, bias, out_TF[:, own])
            else:
                weight.multiply(x_TE, bias, out_TF[:, own])
            first += weight.features
        return out_TF

    def read_rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        if self._plain:
            return self._plain.read_rows(ids_T)
        out_TE = torch.empty((len(ids_T), self.shape[1]), dtype=self._dtype, device=ids_T.device)
        first = 0
        for weight in self._weights:
            weight.read_rows(ids_T - first, out_TE)
            first += weight.features
        return out_TE


def _bits(scheme: Scheme | None, device: torch.device, dtype: torch.dtype) -> float:
    """Of a weight, scales included."""
    if scheme is None or (scheme.is_float and not multiplies_float8(device)):
        return 8 * dtype.itemsize
    of_groups = (16 if scheme.symmetric else 32) / scheme.group_size if scheme.group_size else 0.0
    return scheme.weight_bits + of_groups


def _format(weight: AffineWeight) -> tuple[object, ...]:
    """Weights that agree in it become one."""
    return weight.is_float, layout_for(weight), weight.group_size, weight.order and weight.order.key


def _obstacle(parts: list[Part], device: torch.device) -> str:
    """Why the weight has to be dequantized; empty if it does not."""
    for part in parts:
        if not isinstance(part, AffineWeight):
            return "the checkpoint has parts of these layers that are not quantized"
        if part.is_float and not multiplies_float8(device):
            return "float8 needs a GPU of compute capability 8.9 (Ada, Hopper) or later; int8 does not"
        if part.is_float and not float8_weight.takes(part):
            return "products of float8 need a scale per tensor or channel, and sizes that 16 divides"
        if not part.is_float and layout_for(part) is None:
            return f"no kernel takes groups of {part.group_size} inputs; multiples of 16 would do"
    return ""


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("some layers are dequantized as they are loaded, and take as much memory as plain ones: %s", reason)
