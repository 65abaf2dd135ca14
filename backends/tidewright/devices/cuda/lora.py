"""LoRA adapters on a GPU: each row times its adapter's matrices, all adapters of a step in two launches (as Punica's
SGMV: Chen et al. 2023). Rows shrink to their rank in float32, then expand and are added to the layer's product.

A program takes a tile of rows of one slot, and sums in a fixed order: a row does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tidewright.devices.cuda.launch import start
from tidewright.devices.cuda.lora_kernels import EXPAND, RANKS, ROWS, SHRINK, expand_kernel, shrink_kernel
from tidewright.lora.layer import LoraLayer, Parts
from tidewright.step.adapters import TILE_ROWS

if TYPE_CHECKING:
    from tidewright.step.adapters import AdapterRows

assert ROWS == TILE_ROWS


class CudaLora(LoraLayer):
    """The slots' matrices lie on the device, with room for the highest rank; to fill a slot copies them there."""

    def __init__(self, part_features: Sequence[int], in_features: int, slots: int, max_rank: int) -> None:
        """In torch's default dtype, on its default device."""
        super().__init__(part_features, slots)
        self._num_parts, self._most_features = len(part_features), max(part_features)
        ranks, features = -(-max_rank // RANKS) * RANKS, sum(part_features)
        made = {
            "a_SPRE": torch.zeros(slots, self._num_parts, ranks, in_features),
            "b_SRF": torch.zeros(slots, ranks, features),
            "ranks_SP": torch.zeros(slots, self._num_parts, dtype=torch.int32),
            "scales_SP": torch.zeros(slots, self._num_parts, dtype=torch.float32),
            "ends_P": torch.tensor([own.stop for own in self._features], dtype=torch.int32),
        }
        for name, tensor in made.items():
            self.register_buffer(name, tensor, persistent=False)
        self.a_SPRE: torch.Tensor
        self.b_SRF: torch.Tensor
        self.ranks_SP: torch.Tensor
        self.scales_SP: torch.Tensor
        self.ends_P: torch.Tensor

    def put(self, slot: int, parts: Parts) -> None:
        self.ranks_SP[slot].zero_()
        for number, (own, part) in enumerate(zip(self._features, parts, strict=False)):
            if part:
                for matrix, given in ((self.a_SPRE[slot, number], part.a), (self.b_SRF[slot, :, own], part.b)):
                    matrix[: part.rank].copy_(given)
                    matrix[part.rank :].zero_()  # whole groups of ranks are read
                self.ranks_SP[slot, number] = part.rank
                self.scales_SP[slot, number] = part.scale

    def add(self, x_TE: torch.Tensor, y_TF: torch.Tensor, adapters: AdapterRows) -> None:
        assert x_TE.stride(1) == y_TF.stride(1) == 1
        tiles, ranks = len(adapters.tiles_M3), self.a_SPRE.shape[2]
        h_NPR = x_TE.new_empty((len(adapters.rows_N), self._num_parts, ranks), dtype=torch.float32)
        rows = adapters.rows_N, adapters.tiles_M3
        matrices = self.a_SPRE, self.ranks_SP, self.scales_SP
        sizes = self._num_parts, ranks, x_TE.shape[1], x_TE.stride(0)
        start(shrink_kernel, (tiles, self._num_parts, ranks // RANKS), SHRINK, x_TE, h_NPR, *rows, *matrices, *sizes)
        blocks = -(-self._most_features // EXPAND.constants["F"])
        matrices = self.b_SRF, self.ranks_SP, self.ends_P
        sizes = self._num_parts, ranks, y_TF.shape[1], y_TF.stride(0)
        start(expand_kernel, (tiles, self._num_parts, blocks), EXPAND, h_NPR, y_TF, *rows, *matrices, *sizes)
