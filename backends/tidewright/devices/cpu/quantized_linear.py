"""A linear layer's weight in few bits on a CPU: packed for the kernels as soon as all its parts are loaded.

Weight-only schemes multiply integers, too: activations are quantized in groups of inputs, which costs little accuracy.
What the kernels don't take (float8, odd groups) is dequantized, and so is a layer of which a part is not quantized.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tidewright.devices.cpu.kernels import PackedWeight
from tidewright.devices.cpu.linear import CpuLinear
from tidewright.devices.cpu.quantized import PackedQuantizedWeight, QuantizedKernels, can_pack
from tidewright.distributed.sharding import Cut
from tidewright.layers.linear_method import LinearMethod, read_part
from tidewright.layers.weights import Loader, WeightSlice
from tidewright.quantization.affine import AffineWeight, Scheme

Part = torch.Tensor | AffineWeight


class CpuQuantizedLinear(LinearMethod):
    def __init__(
        self,
        out_features: int,
        in_features: int,
        scheme: Scheme | None,
        kernels: QuantizedKernels,
        allocate: Callable[[int], torch.Tensor],
    ) -> None:
        """`scheme` of weights that the checkpoint has not quantized; `allocate` as PackedQuantizedWeight has it."""
        super().__init__()
        self._shape, self._scheme = (out_features, in_features), scheme
        self._kernels, self._allocate = kernels, allocate
        self._parts: dict[int, Part] = {}  # by first row; until all are there
        self._quantized: PackedQuantizedWeight | None = None
        self._plain: CpuLinear | None = None

    @property
    def packed(self) -> PackedWeight | PackedQuantizedWeight | None:
        return self._plain.packed if self._plain else self._quantized

    def loaders(self, name: str, rows: Cut, columns: Cut, first: int = 0, padding: int = 0) -> dict[str, Loader]:
        def load(source: WeightSlice) -> None:
            self._parts[first] = _padded(read_part(source, rows, columns, self._scheme), padding)
            if sum(_rows(part) for part in self._parts.values()) == self._shape[0]:
                self._pack([self._parts[row] for row in sorted(self._parts)])
                self._parts = {}

        return {f"{name}.weight": load}

    def finish(self) -> None:
        if self._plain:
            self._plain.finish()

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

    def _pack(self, parts: list[Part]) -> None:
        quantized = [part for part in parts if isinstance(part, AffineWeight) and can_pack(part)]
        if len(quantized) == len(parts):
            self._quantized = PackedQuantizedWeight(quantized, self._allocate)
            return
        plain = [part.dequantized() if isinstance(part, AffineWeight) else part for part in parts]
        self._plain = CpuLinear(*self._shape).to(self._kernels.dtype)
        size = self._plain.weight.nbytes
        self._plain.weight.data = self._allocate(size).view(self._kernels.dtype).view(self._shape)
        self._plain.weight.copy_(torch.cat([part.to(self._kernels.dtype) for part in plain]))


def _rows(part: Part) -> int:
    return part.codes_FE.shape[0] if isinstance(part, AffineWeight) else part.shape[0]


def _padded(part: Part, rows: int) -> Part:
    """With so many rows of zeros behind it."""
    if not rows:
        return part
    if not isinstance(part, AffineWeight):
        return F.pad(part, (0, 0, 0, rows))
    codes_FE = F.pad(part.codes_FE.view(torch.int8), (0, 0, 0, rows)).view(part.codes_FE.dtype)
    offsets_FG = None if part.offsets_FG is None else F.pad(part.offsets_FG, (0, 0, 0, rows))
    return AffineWeight(codes_FE, F.pad(part.scales_FG, (0, 0, 0, rows)), offsets_FG, part.bits, part.group_size)
