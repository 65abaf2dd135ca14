"""A linear layer's weight in few bits on a CPU: packed for the kernels as soon as all its parts are loaded.

Weight-only schemes multiply integers, too: activations are quantized in groups of inputs, which costs little accuracy.
What the kernels don't take (float8, odd groups) is dequantized, and so is a layer of which a part is not quantized.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tidewright.devices.cpu.kernels import PackedWeight
from tidewright.devices.cpu.linear import CpuLinear
from tidewright.devices.cpu.quantized import PackedQuantizedWeight, QuantizedKernels, can_pack
from tidewright.layers.gathered_linear import GatheredLinear, Part, dequantized
from tidewright.quantization.affine import AffineWeight, Scheme


class CpuQuantizedLinear(GatheredLinear):
    def __init__(
        self,
        out_features: int,
        in_features: int,
        scheme: Scheme | None,
        kernels: QuantizedKernels,
        allocate: Callable[[int], torch.Tensor],
        is_head: bool = False,
    ) -> None:
        """`allocate` as PackedQuantizedWeight has it."""
        super().__init__(out_features, in_features, scheme, is_head)
        self._kernels, self._allocate = kernels, allocate
        self._quantized: PackedQuantizedWeight | None = None
        self._plain: CpuLinear | None = None  # a module of its own, which the device finishes

    @property
    def packed(self) -> PackedWeight | PackedQuantizedWeight | None:
        return self._plain.packed if self._plain else self._quantized

    def multiply(self, x_TE: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        if self._plain:
            return self._plain.multiply(x_TE, bias_F)
        assert self._quantized
        return self._kernels.linear(x_TE, self._quantized, bias_F)

    def read_rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        if self._plain:
            return self._plain.read_rows(ids_T)
        assert self._quantized
        return self._kernels.embedding(ids_T, self._quantized)

    def take(self, parts: list[Part]) -> None:
        quantized = [part for part in parts if isinstance(part, AffineWeight) and can_pack(part)]
        if len(quantized) == len(parts):
            self._quantized = PackedQuantizedWeight(quantized, self._allocate)
            return
        self._plain = CpuLinear(*self.shape).to(self._kernels.dtype)
        size = self._plain.weight.nbytes
        self._plain.weight.data = self._allocate(size).view(self._kernels.dtype).view(self.shape)
        self._plain.weight.copy_(dequantized(parts, self._kernels.dtype))
