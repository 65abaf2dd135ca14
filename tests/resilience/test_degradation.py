"""resilience/degradation.py: up at once, down slowly and step by step, and no flapping in between."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright.resilience.config import ResilienceSettings
from tidewright.resilience.degradation import Degradation, Ladder, Level, Load, Route, Thresholds, treatment

SETTINGS = ResilienceSettings(
    degrade_kv_cache_short=0.8,
    degrade_kv_cache_fallback=0.9,
    degrade_queue_short=0.25,
    degrade_queue_fallback=0.5,
    degrade_queue_shed=0.75,
    degrade_wait_short=2.0,
    degrade_wait_fallback=8.0,
    degrade_wait_shed=32.0,
    degrade_release=0.5,
    degrade_dwell=10.0,
)
CONFIG = SETTINGS.ladder_config()
CALM = Load(kv_cache=0.0, queue=0.0, wait=0.0, breaker_open=False)
LOADS = st.builds(
    Load,
    kv_cache=st.sampled_from([0.0, 0.3, 0.41, 0.5, 0.79, 0.8, 0.95, 1.0]),
    queue=st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.6, 1.0]),
    wait=st.sampled_from([0.0, 1.5, 3.0, 20.0, 100.0]),
    breaker_open=st.booleans(),
)


def queue(share: float) -> Load:
    return Load(kv_cache=0.0, queue=share, wait=0.0, breaker_open=False)


def levels_of(load: Load, scale: float) -> list[int]:
    """By hand from the settings' numbers, each threshold scaled."""
    thresholds = [
        (load.kv_cache, (0.8, 0.9)),
        (load.queue, (0.25, 0.5, 0.75)),
        (load.wait, (2.0, 8.0, 32.0)),
    ]
    return [sum(value >= scale * threshold for threshold in row) for value, row in thresholds]


@pytest.mark.parametrize(
    ("load", "level", "reasons"),
    [
        (CALM, Level.ALL_FEATURES, ()),
        (Load(0.79, 0.24, 1.9, False), Level.ALL_FEATURES, ()),
        (Load(0.8, 0.0, 0.0, False), Level.SHORT_ANSWERS, ("kv_cache",)),
        (Load(1.0, 0.0, 0.0, False), Level.FALLBACK_ONLY, ("kv_cache",)),
        (Load(0.0, 0.25, 2.0, False), Level.SHORT_ANSWERS, ("queue", "wait")),
        (Load(0.0, 0.5, 0.0, False), Level.FALLBACK_ONLY, ("queue",)),
        (Load(0.0, 0.75, 0.0, False), Level.SHED, ("queue",)),
        (Load(0.0, 0.0, 32.0, False), Level.SHED, ("wait",)),
        (Load(0.0, 0.0, 0.0, True), Level.FALLBACK_ONLY, ("breaker",)),
        (Load(0.8, 0.0, 0.0, True), Level.FALLBACK_ONLY, ("kv_cache", "breaker")),
        (Load(0.0, 0.0, 99.0, True), Level.SHED, ("wait", "breaker")),
    ],
)
def test_each_signal_leads_to_its_level_at_once(load: Load, level: Level, reasons: tuple[str, ...]) -> None:
    degradation = Ladder(CONFIG).update(load, 0.0)
    assert (degradation.level, degradation.reasons) == (level, reasons)


def test_a_smaller_variant_has_a_rung_between_short_answers_and_the_fallback() -> None:
    config = SETTINGS.smaller_ladder_config()
    for load, is_on in ((queue(0.37), False), (queue(0.375), True), (Load(0.86, 0.0, 0.0, False), True)):
        assert (Ladder(config).update(load, 0.0).level > 0) == is_on
    assert Ladder(config).update(Load(1.0, 1.0, 1000.0, False), 0.0).level is Level.SHORT_ANSWERS  # it has no others


def test_down_goes_one_step_at_a_time_each_after_the_dwell() -> None:
    ladder = Ladder(CONFIG)
    ladder.update(queue(1.0), 0.0)
    seen = [ladder.update(CALM, float(now)) for now in range(1, 40)]
    assert [degradation.level for degradation in seen] == (
        [Level.SHED] * 10 + [Level.FALLBACK_ONLY] * 10 + [Level.SHORT_ANSWERS] * 10 + [Level.ALL_FEATURES] * 9
    )
    assert seen[0].reasons == ("dwell",)
    assert seen[-1].reasons == ()


def test_between_the_thresholds_nothing_changes() -> None:
    ladder = Ladder(CONFIG)
    ladder.update(queue(0.25), 0.0)
    for now in range(1, 100):
        degradation = ladder.update(queue(0.13 if now % 2 else 0.49), float(now))
        assert (degradation.level, degradation.reasons) == (Level.SHORT_ANSWERS, ("queue",))


def test_the_calm_must_last() -> None:
    ladder = Ladder(CONFIG)
    ladder.update(queue(0.25), 0.0)
    for now in range(1, 100):
        load = CALM if now % 9 else queue(0.2)  # too low to lead there, high enough to hold
        assert ladder.update(load, float(now)).level is Level.SHORT_ANSWERS


def test_calm_before_a_rise_does_not_count_after_it() -> None:
    ladder = Ladder(CONFIG)
    ladder.update(queue(0.25), 0.0)
    ladder.update(CALM, 1.0)
    ladder.update(queue(1.0), 5.0)
    ladder.update(CALM, 6.0)
    assert ladder.update(CALM, 15.0).level is Level.SHED
    assert ladder.update(CALM, 16.0).level is Level.FALLBACK_ONLY


def test_the_breaker_has_no_dwell_of_its_own() -> None:
    ladder = Ladder(CONFIG)
    ladder.update(Load(0.0, 0.0, 0.0, True), 0.0)
    assert ladder.update(CALM, 0.0).level is Level.ALL_FEATURES


def test_a_clock_that_is_set_back_starts_the_calm_anew() -> None:
    ladder = Ladder(CONFIG)
    ladder.update(queue(0.25), 1000.0)
    ladder.update(CALM, 1000.0)
    assert ladder.update(CALM, 5.0).level is Level.SHORT_ANSWERS
    assert ladder.update(CALM, 14.0).level is Level.SHORT_ANSWERS
    assert ladder.update(CALM, 15.0).level is Level.ALL_FEATURES


@settings(max_examples=500)
@given(st.lists(st.tuples(LOADS, st.sampled_from([0.0, 1.0, 4.0, 11.0])), max_size=100))
def test_no_history_of_loads_makes_it_flap(history: list[tuple[Load, float]]) -> None:
    ladder, now, level, changed = Ladder(CONFIG), 0.0, 0, 0.0
    for load, step in history:
        now += step
        degradation = ladder.update(load, now)
        new, reached, held = degradation.load_level, max(levels_of(load, 1.0)), max(levels_of(load, 0.5))
        assert degradation.level == max(new, Level.FALLBACK_ONLY if load.breaker_open else 0)
        assert new >= reached
        if new > level:
            assert new == reached
        if new < level:
            assert new == level - 1
            assert held < level
            assert now - changed >= 10.0
        if new != level or held >= level:
            changed = now
        level = new


@pytest.mark.parametrize(
    ("level", "load_level", "expected"),
    [
        (Level.ALL_FEATURES, Level.ALL_FEATURES, (Route.DECODER, 1000)),
        (Level.SHORT_ANSWERS, Level.SHORT_ANSWERS, (Route.DECODER, 64)),
        (Level.FALLBACK_ONLY, Level.FALLBACK_ONLY, (Route.FALLBACK, 64)),
        (Level.SHED, Level.SHED, (Route.REFUSE, 0)),
        # An open breaker refuses by itself; it could never close if nobody asked it for a probe.
        (Level.FALLBACK_ONLY, Level.ALL_FEATURES, (Route.DECODER, 64)),
    ],
)
def test_what_a_level_means_for_a_request(level: Level, load_level: Level, expected: tuple[Route, int]) -> None:
    given_to = treatment(Degradation(level, load_level, ()), max_tokens=1000, short_answer=64)
    assert (given_to.route, given_to.max_tokens) == expected


def test_a_short_request_is_left_as_it_is() -> None:
    assert treatment(Degradation(Level.SHORT_ANSWERS, Level.SHORT_ANSWERS, ()), 5, 64).max_tokens == 5


def test_thresholds_are_reached_at_their_value() -> None:
    assert [Thresholds(1, 2, 3).level(value) for value in (0.9, 1, 2, 3, 9)] == [0, 1, 2, 3, 3]
