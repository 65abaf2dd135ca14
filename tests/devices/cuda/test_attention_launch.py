"""How many splits and tiles: enough, and the same split of a context whatever the bound on the batch's contexts."""

from __future__ import annotations

import itertools

import pytest

from tidewright.devices.cuda.attention_launch import (
    MIN_SPLIT,
    AttentionShape,
    count_prefill_tiles,
    count_splits,
    prefill_launch,
)


@pytest.mark.parametrize("kv_heads", [1, 3, 8, 200])
def test_any_bound_above_a_context_leaves_it_as_many_splits(kv_heads: int) -> None:
    for length in (1, 256, 257, 2000, 100_000):
        wanted = -(-length // MIN_SPLIT)
        used = {min(wanted, count_splits(kv_heads, length + more, 132)) for more in (0, 1, 300, 5000, 10**6)}
        assert len(used) == 1


def test_one_sequence_occupies_the_device_and_a_short_context_is_not_split() -> None:
    assert count_splits(kv_heads=8, max_context=100_000, processors=132) * 8 >= 128
    assert count_splits(kv_heads=1, max_context=MIN_SPLIT, processors=132) == 1


@pytest.mark.parametrize("heads", [8, 24, 56])
def test_tiles_are_enough_for_any_spans(heads: int) -> None:
    launch = prefill_launch(AttentionShape(heads, 8, 128, 16, 2), max_query=100)
    tokens = launch.constants["M"] // launch.constants["GROUP"]
    for counts in itertools.product([0, 1, tokens - 1, tokens, tokens + 1, 3 * tokens], repeat=3):
        starts = [sum(counts[:i]) for i in range(4)]
        firsts = [start // tokens + i for i, start in enumerate(starts)]
        for i, count in enumerate(counts):
            assert firsts[i + 1] - firsts[i] >= -(-count // tokens)
        assert firsts[2] + -(-counts[2] // tokens) <= count_prefill_tiles(launch, starts[3], 3)
