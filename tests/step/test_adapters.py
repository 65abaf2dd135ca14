"""step/adapters.py: the tiles say of each row what the list of slots says, whatever came before."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidewright.step.adapters import TILE_ROWS, AdapterColumn, adapter_arrays, most_tiles
from tidewright.step.arena import Arena

TOKENS, SLOTS = 60, 4
RUNS = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 20)), max_size=8)


@given(st.lists(RUNS, min_size=1, max_size=3), st.integers(0, 8))
def test_each_row_is_in_one_tile_of_its_slot(steps: list[list[tuple[int, int]]], padding: int) -> None:
    """Padded, there are as many rows and tiles as any step of that size has."""
    arena = Arena(adapter_arrays(TOKENS, SLOTS), torch.device("cpu"), staged=True)
    column = AdapterColumn(arena, SLOTS)
    for runs in steps:
        slots = [slot for slot, count in runs for _ in range(count)][:TOKENS]
        for _ in range(2):  # the second time it is the same as before
            padded_to = min(len(slots) + padding, TOKENS) if padding else 0
            adapters = column.gather(np.array(slots, np.int32), padded_to)
            arena.upload()
            if adapters is None:
                assert all(slot < 0 for slot in slots)
                continue
            found = [-1] * len(slots)
            tiles = adapters.tiles_M3.tolist()
            if padded_to:
                assert (len(adapters.rows_N), len(tiles)) == (padded_to, most_tiles(padded_to, SLOTS))
                assert not any(map(any, tiles[len(adapters.host_tiles_M3) :]))
                tiles = tiles[: len(adapters.host_tiles_M3)]
            for slot, first, count in tiles:
                assert 0 < count <= TILE_ROWS
                for row in adapters.rows_N[first : first + count].tolist():
                    assert found[row] == -1
                    found[row] = slot
            assert found == slots
            assert adapters.host_tiles_M3.tolist() == tiles
