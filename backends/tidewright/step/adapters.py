"""Which rows of a step use which LoRA adapter, in the order in which a grouped product takes them."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tidewright.step.arena import Arena

TILE_ROWS = 16
"""That one tile has at most: what a GPU's tensor cores multiply at once."""
_INT = np.dtype(np.int32)


@dataclass(frozen=True, eq=False)
class AdapterRows:
    """The rows with an adapter, those of one slot side by side, cut into tiles of one slot each.

    On the CPU, host and device are the same memory.
    """

    rows_N: torch.Tensor  # int32; their numbers in the batch
    tiles_M3: torch.Tensor  # int32; slot, first entry in `rows_N`, number of entries: 0 is padding
    host_tiles_M3: np.ndarray  # the same without padding


def adapter_arrays(tokens: int, slots: int) -> Mapping[str, tuple[np.dtype, int]]:
    """What AdapterColumn needs in the arena; nothing without slots."""
    if not slots:
        return {}
    return {"adapters.rows": (_INT, tokens), "adapters.tiles": (_INT, 3 * (tokens // TILE_ROWS + slots))}


def most_tiles(rows: int, slots: int) -> int:
    """Of so many rows, however they are spread over the slots."""
    return min(rows, rows // TILE_ROWS + slots)


class AdapterColumn:
    """Writes the arena only if the rows' adapters changed since the last step that had some."""

    def __init__(self, arena: Arena, slots: int) -> None:
        self._arena, self._slots = arena, slots
        self._slots_T: np.ndarray = np.empty(0, _INT)  # of that step
        self._padded_to = 0
        self._num_rows = self._num_tiles = 0

    def gather(self, slots_T: np.ndarray, padded_to: int = 0) -> AdapterRows | None:
        """`slots_T`: of the step's rows; negative: none. The caller uploads the arena.

        `padded_to`: on the device there are as many rows and tiles as so many rows may need, the last ones empty.
        """
        if not len(slots_T) or slots_T.max() < 0:
            return None
        return self._gather(slots_T, padded_to)

    def padding(self, padded_to: int) -> AdapterRows:
        """What every step sees that is padded to this size, before it is filled."""
        return self._gather(np.empty(0, _INT), padded_to)

    def _gather(self, slots_T: np.ndarray, padded_to: int) -> AdapterRows:
        host, device = self._arena.host, self._arena.device
        if padded_to != self._padded_to or not np.array_equal(slots_T, self._slots_T):
            self._slots_T, self._padded_to = slots_T, padded_to
            order_T = np.argsort(slots_T, kind="stable")
            rows_N = order_T[np.count_nonzero(slots_T < 0) :]
            slots_U, firsts_U, counts_U = np.unique(slots_T[rows_N], return_index=True, return_counts=True)
            tiles_U = -(-counts_U // TILE_ROWS)
            number_M = np.arange(tiles_U.sum()) - np.repeat(np.cumsum(tiles_U) - tiles_U, tiles_U)  # of its slot's
            all_M3 = host["adapters.tiles"].reshape(-1, 3)
            tiles_M3 = all_M3[: len(number_M)]
            tiles_M3[:, 0] = np.repeat(slots_U, tiles_U)
            tiles_M3[:, 1] = np.repeat(firsts_U, tiles_U) + number_M * TILE_ROWS
            tiles_M3[:, 2] = np.minimum(np.repeat(counts_U, tiles_U) - number_M * TILE_ROWS, TILE_ROWS)
            host["adapters.rows"][: len(rows_N)] = rows_N
            self._num_rows, self._num_tiles = len(rows_N), len(number_M)
            if padded_to:
                host["adapters.rows"][len(rows_N) : padded_to] = 0
                all_M3[len(number_M) : most_tiles(padded_to, self._slots)] = 0
        num_rows = padded_to or self._num_rows
        num_tiles = most_tiles(padded_to, self._slots) if padded_to else self._num_tiles
        return AdapterRows(
            device["adapters.rows"][:num_rows],
            device["adapters.tiles"].view(-1, 3)[:num_tiles],
            host["adapters.tiles"].reshape(-1, 3)[: self._num_tiles],
        )
