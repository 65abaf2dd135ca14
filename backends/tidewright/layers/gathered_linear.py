"""A linear method that makes its weight of all parts at once: formats that merge rows, or choose by what has come."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
import torch.nn.functional as F

from tidewright.distributed.sharding import Cut
from tidewright.layers.linear_method import LinearMethod, read_part
from tidewright.layers.weights import Loader, WeightSlice
from tidewright.quantization.affine import AffineWeight, Scheme

Part = torch.Tensor | AffineWeight


class GatheredLinear(LinearMethod):
    """As soon as the last part is loaded, so that memory peaks at one layer."""

    def __init__(self, out_features: int, in_features: int, scheme: Scheme | None, is_head: bool = False) -> None:
        """`scheme` of weights that the checkpoint has not quantized. `is_head`: its rows may be read, too."""
        super().__init__()
        self.shape, self.scheme, self._is_head = (out_features, in_features), scheme, is_head
        self._parts: dict[int, Part] = {}  # by first row; until all are there

    @abstractmethod
    def take(self, parts: list[Part]) -> None:
        """The rows of the weight, in their order."""

    def read(self, source: WeightSlice, rows: Cut, columns: Cut) -> Part:
        return read_part(source, rows, columns, self.scheme)

    def loaders(self, name: str, rows: Cut, columns: Cut, first: int = 0, padding: int = 0) -> dict[str, Loader]:
        def load(source: WeightSlice) -> None:
            part = self.read(source, rows, columns)
            if self._is_head and isinstance(part, AffineWeight) and part.order:
                part = part.dequantized()  # rows are read in the order of inputs
            self._parts[first] = _padded(part, padding)
            if sum(_rows(part) for part in self._parts.values()) == self.shape[0]:
                parts, self._parts = [self._parts[row] for row in sorted(self._parts)], {}
                self.take(parts)

        return {f"{name}.weight": load}


def dequantized(parts: list[Part], dtype: torch.dtype) -> torch.Tensor:
    plain = [part.dequantized() if isinstance(part, AffineWeight) else part for part in parts]
    return torch.cat([part.to(dtype) for part in plain])


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
    scales_FG = F.pad(part.scales_FG, (0, 0, 0, rows))
    return replace(part, codes_FE=codes_FE, scales_FG=scales_FG, offsets_FG=offsets_FG)
