"""metrics/busiest.py: the number of series is bounded, and the busiest keys have them."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tidewright_gateway.metrics.busiest import OTHER, Busiest

KEYS = st.integers(0, 200).map(str)


@given(st.lists(st.one_of(KEYS, st.just("rebalance")), max_size=600), st.integers(1, 5))
def test_no_more_labels_than_allowed_and_none_comes_twice(events: list[str], size: int) -> None:
    demoted: list[str] = []
    busiest = Busiest(size, demoted.append)
    shown: set[str] = set()
    for event in events:
        if event == "rebalance":
            busiest.rebalance()
            shown -= set(demoted)
            demoted.clear()
        else:
            label = busiest.name(event)
            assert label in (event, OTHER)
            assert busiest.label(event) == label
            if label != OTHER:
                shown.add(event)
        assert not demoted
        assert len(shown) <= size
    assert len(busiest._counts) <= 16 * size + 1


def test_a_flood_of_keys_takes_no_series_from_busy_ones() -> None:
    demoted: list[str] = []
    busiest = Busiest(2, demoted.append)
    for number in range(10_000):
        busiest.name("busy")
        busiest.name("steady")
        assert busiest.name(f"passer-by {number}") == OTHER
        if number % 100 == 0:
            busiest.rebalance()
    assert not demoted
    assert {busiest.label("busy"), busiest.label("steady")} == {"busy", "steady"}


def test_a_key_that_becomes_busier_replaces_the_idlest() -> None:
    demoted: list[str] = []
    busiest = Busiest(2, demoted.append)
    labels = Counter(busiest.name(key) for key in ["a"] * 5 + ["b"] * 2 + ["c"] * 4)
    assert labels == {"a": 5, "b": 2, OTHER: 4}
    busiest.rebalance()
    assert not demoted  # twice as busy is not enough
    for _ in range(5):
        busiest.name("c")
    busiest.rebalance()
    assert demoted == ["b"]
    assert (busiest.name("c"), busiest.name("b")) == ("c", OTHER)


def test_where_series_stay_for_ever_promotions_end() -> None:
    busiest = Busiest(2, lambda key: None, promotions=5)
    seen = set()
    for number in range(50):
        for _ in range(2 ** min(number, 10)):
            busiest.name(f"key {number}")
        busiest.rebalance()
        seen.add(busiest.name(f"key {number}"))
    assert len(seen - {OTHER}) == 5
