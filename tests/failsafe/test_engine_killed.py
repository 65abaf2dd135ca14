"""A request that engines die over: the fallback may answer it, but no breaker opens for it, and nobody asks again."""

from __future__ import annotations

import pytest

from helpers.two_models import end, world
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome, Verdict
from tidewright.schema import KILLS_ENGINES

ERROR = f"{KILLS_ENGINES} [engine_failed]"


def test_it_is_known_by_its_error() -> None:
    error = ModelError(ERROR)
    assert (error.outcome, error.reason, str(error)) == (Outcome.ENGINE_KILLED, "engine_failed", KILLS_ENGINES)
    assert error.outcome.verdict is Verdict.IGNORED


def test_the_fallback_answers_and_the_breaker_stays_closed() -> None:
    with world(breaker_consecutive_failures=1) as it:
        it.models.scripts["decoder"] = [[ERROR]] * 3
        for _ in range(3):
            assert end(it.submit().end()) == ("fallback", "engine_killed")
        assert it.sample("breaker_state", "closed") == 1
        assert it.sample("outcomes_total", "engine_killed") == 3


@pytest.mark.parametrize("before", [[], [[1]]])
def test_the_decoder_is_not_asked_again(before: list[list[int]]) -> None:
    with world(fallback="", retry_max_attempts=3) as it:
        it.models.scripts["decoder"] = [[*before, ERROR]]
        caller = it.submit()
        assert caller.end() is None
        assert caller.reason == "engine_failed"
        assert len(it.models.calls) == 1


def test_a_mistake_of_the_caller_is_one_whatever_it_quotes() -> None:
    assert ModelError(f"guided_regex: {KILLS_ENGINES} [invalid]").outcome is Outcome.INVALID
