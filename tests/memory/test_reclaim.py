"""memory/reclaim.py: the order is kept, no more is taken than is wanted and there, and nothing goes back and forth."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidewright.memory.reclaim import STAGES, Watermarks, share_out, to_give_back, to_reclaim

SIZES = st.integers(0, 1000)


@given(st.integers(-10, 5000), st.dictionaries(st.sampled_from(STAGES), SIZES))
def test_a_later_stage_gives_nothing_before_all_others_gave_everything(wanted: int, offers: dict[str, int]) -> None:
    taken = share_out(wanted, offers)
    assert sum(taken.values()) == min(max(wanted, 0), sum(offers.values()))
    for index, stage in enumerate(STAGES):
        assert 0 <= taken[stage] <= offers.get(stage, 0)
        if taken[stage]:
            assert all(taken[before] == offers.get(before, 0) for before in STAGES[:index])


@given(st.integers(0, 200), st.integers(0, 200), st.integers(-100, 1000), st.integers(1, 100), SIZES)
def test_what_is_reclaimed_is_not_given_back_and_what_is_given_back_is_not_reclaimed(
    low: int, more: int, free: int, slab: int, lacking: int
) -> None:
    marks = Watermarks(low, low + more)
    if wanted := to_reclaim(free, marks):
        assert free < low
        assert free + wanted == marks.high
        assert not to_give_back(free, marks, slab, lacking)
        assert not to_give_back(free + wanted, marks, slab, lacking)
    elif given_back := to_give_back(free, marks, slab, lacking):
        assert 0 < given_back <= min(slab, lacking)
        assert free - given_back >= marks.high
        assert not to_reclaim(free - given_back, marks)
    else:
        assert free - min(slab, lacking) < marks.high or not lacking


def test_watermarks_grow_with_the_machine_up_to_what_a_step_may_take() -> None:
    assert Watermarks.of(4 << 30) == Watermarks((4 << 30) // 40, 2 * ((4 << 30) // 40))
    assert Watermarks.of(1 << 40) == Watermarks(512 << 20, 1 << 30)
