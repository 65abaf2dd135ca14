"""step/adapters.py: the tiles say of each row what the list of slots says, whatever came before."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidewright.step.adapters import TILE_ROWS, AdapterColumn, adapter_arrays
from tidewright.step.arena import Arena

TOKENS, SLOTS = 60, 4
RUNS = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 20)), max_size=8)


@given(st.lists(RUNS, min_size=1, max_size=3))
def test_each_row_is_in_one_tile_of_its_slot(steps: list[list[tuple[int, int]]]) -> None:
    arena = Arena(adapter_arrays(TOKENS, SLOTS), torch.device("cpu"), staged=True)
    column = AdapterColumn(arena)
    for runs in steps:
        slots = [slot for slot, count in runs for _ in range(count)][:TOKENS]
        for _ in range(2):  # the second time it is the same as before
            adapters = column.gather(np.array(slots, np.int32))
            arena.upload()
            if adapters is None:
                assert all(slot < 0 for slot in slots)
                continue
            found = [-1] * len(slots)
            for slot, first, count in adapters.tiles_M3.tolist():
                assert 0 < count <= TILE_ROWS
                for row in adapters.rows_N[first : first + count].tolist():
                    assert found[row] == -1
                    found[row] = slot
            assert found == slots
            np.testing.assert_array_equal(adapters.host_tiles_M3, adapters.tiles_M3.numpy())
