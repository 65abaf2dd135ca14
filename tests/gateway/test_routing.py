"""Which replica gets a request: pure, so by properties."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewright_gateway.routing import PREFIX_BLOCK, Candidate, LeastLoad, PrefixAware, make_router

NAMES = ["a", "b", "c"]


def idle(names: list[str] = NAMES) -> list[Candidate]:
    return [Candidate(name, 0, 0.0) for name in names]


@pytest.mark.parametrize("name", ["round_robin", "least_load", "prefix"])
def test_equal_replicas_get_equal_shares(name: str) -> None:
    router = make_router(name)
    # Prompts without a common beginning, and nothing in flight for long: the share is up to the router alone.
    got = Counter(router.choose(idle(), [number] * PREFIX_BLOCK) for number in range(300))
    assert set(got.values()) == {100}


def test_least_load_gives_equal_shares_whatever_each_request_takes() -> None:
    """A simulation: always 8 in flight, which end in any order."""
    router, rng = LeastLoad(), random.Random(0)
    got: Counter[str] = Counter()
    running: list[str] = []
    for _ in range(3000):
        candidates = [Candidate(name, running.count(name), 0.0) for name in NAMES]
        running.append(NAMES[router.choose(candidates, [])])
        got[running[-1]] += 1
        if len(running) == 8:
            running.pop(rng.randrange(8))
    assert max(got.values()) <= 1.05 * 1000


@given(st.lists(st.tuples(st.integers(0, 50), st.none() | st.floats(0, 1)), min_size=1, max_size=8), st.integers(1, 5))
def test_nobody_takes_a_replica_that_is_worse_in_every_way(loads: list[tuple[int, float | None]], turns: int) -> None:
    candidates = [Candidate(str(number), in_flight, load) for number, (in_flight, load) in enumerate(loads)]
    router = LeastLoad()
    for _ in range(turns):
        chosen = candidates[router.choose(candidates, [])]
        known = all(candidate.load is not None for candidate in candidates)
        for other in candidates:
            assert not (
                other.in_flight < chosen.in_flight
                and (not known or round(other.load or 0, 1) <= round(chosen.load or 0, 1))
            )


def test_a_full_kv_cache_counts_as_requests() -> None:
    assert LeastLoad().choose([Candidate("full", 2, 0.9), Candidate("empty", 4, 0.1)], []) == 1


def test_one_that_does_not_say_how_full_it_is_makes_all_count_by_requests() -> None:
    candidates = [Candidate("full", 2, 0.9), Candidate("silent", 3, None), Candidate("empty", 4, 0.1)]
    assert LeastLoad().choose(candidates, []) == 0


@given(st.lists(st.integers(0, 9), min_size=PREFIX_BLOCK, max_size=200), st.lists(st.integers(10, 19), max_size=100))
def test_a_prompt_goes_where_its_beginning_is(beginning: list[int], rest: list[int]) -> None:
    router = PrefixAware(LeastLoad())
    home = router.choose(idle(), beginning)
    for candidates in (idle(), [Candidate("new", 0, 0.0), *idle()]):
        index = router.choose(candidates, beginning + rest)
        assert candidates[index].name == NAMES[home]


def test_the_longest_beginning_wins() -> None:
    router = PrefixAware(make_router("round_robin"))
    short, long = [1] * PREFIX_BLOCK, [1] * PREFIX_BLOCK + [2] * PREFIX_BLOCK
    of_short = router.choose(idle(), short)
    others = [candidate for candidate in idle() if candidate.name != NAMES[of_short]]
    of_long = others[router.choose(others, long)].name
    assert NAMES[router.choose(idle(), [*long, 3])] == of_long


def test_a_beginning_that_all_share_does_not_overload_its_home() -> None:
    router = PrefixAware(LeastLoad())
    prompt, in_flight = [1] * PREFIX_BLOCK, dict.fromkeys(NAMES, 0)
    for _ in range(300):
        candidates = [Candidate(name, count, 0.0) for name, count in in_flight.items()]
        in_flight[NAMES[router.choose(candidates, prompt)]] += 1
    assert max(in_flight.values()) <= 1.6 * min(in_flight.values()) + 5


def test_the_table_of_beginnings_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidewright_gateway.routing.PREFIX_BLOCKS", 10)
    router = PrefixAware(LeastLoad())
    for number in range(100):
        router.choose(idle(), [number] * PREFIX_BLOCK * 2)
    assert len(router._homes) == 10
