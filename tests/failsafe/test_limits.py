"""failsafe/limits.py: each rule of `overdue`, on both sides of its limit."""

from __future__ import annotations

import pytest

from tidewright.failsafe.limits import Progress, TimeLimits, overdue
from tidewright.failsafe.pulse import Kind, Trouble
from tidewright.resilience.outcome import Outcome

LIMITS = TimeLimits(patience=1.0, first_token=30.0, stall=10.0)
NOW = 1000.0


def progress(began: float = 0.0, token: float | None = None, streams: bool = True) -> Progress:
    """An attempt that began so many seconds ago, and had its last token so many seconds ago."""
    return Progress(streams, NOW - began, None if token is None else NOW - token)


def trouble(kind: Kind, ago: float) -> Trouble:
    return Trouble(kind, NOW - ago, "a cause")


def check(attempt: Progress, wrong: Trouble | None, expected: Outcome | None, has_fallback: bool = True) -> None:
    assert overdue(attempt, wrong, LIMITS, NOW, has_fallback=has_fallback) is expected


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        (progress(began=30.0), None),
        (progress(began=30.1), Outcome.FIRST_TOKEN_TIMEOUT),
        (progress(began=1000.0, streams=False), None),  # nobody sees how far it is
        (progress(began=1000.0, token=10.0), None),
        (progress(began=1000.0, token=10.1), Outcome.STALLED),
        (progress(began=10.2, token=10.1), Outcome.STALLED),
    ],
)
def test_a_well_decoder_gets_time_for_its_next_token(attempt: Progress, expected: Outcome | None) -> None:
    check(attempt, None, expected)


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        (progress(began=30.0), None),
        (progress(began=30.1), Outcome.FIRST_TOKEN_TIMEOUT),
        (progress(began=1000.0, streams=False), None),
        (progress(began=1000.0, token=10.0), None),
        (progress(began=1000.0, token=10.1), Outcome.STALLED),
    ],
)
def test_one_that_is_unloaded_goes_on_with_what_it_has(attempt: Progress, expected: Outcome | None) -> None:
    check(attempt, trouble(Kind.UNLOADED, 500.0), expected)


@pytest.mark.parametrize(
    ("attempt", "ago", "expected"),
    [
        (progress(began=0.5), 1.0, None),
        (progress(began=0.5), 1.1, Outcome.STALLED),
        (progress(began=500.0), 1.0, None),  # its own limits are not those of a decoder that is well
        (progress(began=500.0), 1.1, Outcome.STALLED),
        (progress(began=500.0, token=400.0), 1.0, None),
        (progress(began=500.0, token=1.2), 1.1, Outcome.STALLED),
        (progress(began=500.0, streams=False), 1.0, None),
        (progress(began=500.0, streams=False), 1.1, Outcome.STALLED),
    ],
)
def test_nobody_waits_for_a_silent_one_beyond_the_patience(
    attempt: Progress, ago: float, expected: Outcome | None
) -> None:
    check(attempt, trouble(Kind.SILENT, ago), expected)


@pytest.mark.parametrize(
    ("attempt", "ago", "expected"),
    [
        # Without a token: nothing is lost by going elsewhere.
        (progress(began=20.0), 1.0, None),
        (progress(began=20.0), 1.1, Outcome.UNAVAILABLE),
        # With some: the next engine goes on with them.
        (progress(began=20.0, token=15.0), 10.0, None),
        (progress(began=20.0, token=15.0), 10.1, Outcome.UNAVAILABLE),
        # Not a stream: it may have some, if it was there when the engine died.
        (progress(began=20.0, streams=False), 10.0, None),
        (progress(began=20.0, streams=False), 10.1, Outcome.UNAVAILABLE),
        (progress(began=0.9, streams=False), 1.0, None),
        (progress(began=1.1, streams=False), 1.1, Outcome.UNAVAILABLE),
        (progress(began=1.2, streams=False), 1.1, None),
    ],
)
def test_one_that_starts_again_is_waited_for_by_who_may_have_tokens_there(
    attempt: Progress, ago: float, expected: Outcome | None
) -> None:
    check(attempt, trouble(Kind.RESTARTING, ago), expected)


@pytest.mark.parametrize("has_fallback", [True, False])
@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        (progress(began=5.1), Outcome.STUB_DIED),
        (progress(began=5.1, token=5.05), Outcome.STUB_DIED),
        (progress(began=5.1, streams=False), Outcome.STUB_DIED),
        # Sent to a dead stub, which Triton answers with an error, or to the next one.
        (progress(began=5.0), None),
        (progress(began=4.9, streams=False), None),
        (progress(began=4.9, token=4.8), None),
    ],
)
def test_what_a_stub_had_is_lost_with_it(attempt: Progress, expected: Outcome | None, has_fallback: bool) -> None:
    check(attempt, trouble(Kind.STUB_DIED, 5.0), expected, has_fallback)


@pytest.mark.parametrize("wrong", [None, *(trouble(kind, 500.0) for kind in Kind if kind is not Kind.STUB_DIED)])
@pytest.mark.parametrize("token", [None, 400.0])
def test_without_a_fallback_the_decoder_is_all_there_is(wrong: Trouble | None, token: float | None) -> None:
    check(progress(began=600.0, token=token), wrong, None, has_fallback=False)
