"""failsafe/models.py: what the text of an error says."""

from __future__ import annotations

import pytest

from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import FINISH_REASONS, expected_wait

OURS = [
    ("invalid", Outcome.INVALID),
    ("cancelled", Outcome.CANCELLED),
    ("overloaded", Outcome.OVERLOADED),
    ("timeout", Outcome.REQUEST_TIMEOUT),
    ("engine_failed", Outcome.ENGINE_FAILED),
]


@pytest.mark.parametrize(("reason", "outcome"), OURS)
def test_an_error_of_ours_ends_with_its_reason(reason: str, outcome: Outcome) -> None:
    error = ModelError(f"what was [wrong] with it [{reason}]")
    assert (error.outcome, error.reason, str(error)) == (outcome, reason, "what was [wrong] with it")


@pytest.mark.parametrize(
    ("message", "wait"),
    [
        (f"too many{expected_wait(4.1)} [overloaded]", 5.0),
        (f"too many{expected_wait(0.0)} [overloaded]", 1.0),
        (f"too many{expected_wait(float('inf'))} [overloaded]", 3600.0),
        ("too many; try again later [overloaded]", None),
        (f"the prompt says{expected_wait(4)} [invalid]", None),
        ("the prompt says; try again in 4 s, it is full [overloaded]", None),
    ],
)
def test_a_refusal_for_load_may_say_when_there_is_room(message: str, wait: float | None) -> None:
    assert ModelError(message).expected_wait == wait


def test_each_reason_of_an_error_is_known() -> None:
    assert {reason for reason, _ in OURS} == set(FINISH_REASONS) - {"stop", "length"}


@pytest.mark.parametrize(
    ("message", "outcome"),
    [
        ("Stub process 'decoder_0_0' is not healthy.", Outcome.STUB_DIED),
        ("Request for unknown model: 'decoder' is not found", Outcome.UNAVAILABLE),
        ("Request for unknown model: 'decoder' version 1 is not at ready state", Outcome.UNAVAILABLE),
        ("", Outcome.UNAVAILABLE),
        ("a reason that we don't have [stop]", Outcome.UNAVAILABLE),
        ("a reason [invalid] that is not its end", Outcome.UNAVAILABLE),
        ("a reason without a space[invalid]", Outcome.UNAVAILABLE),
    ],
)
def test_an_error_of_triton_means_that_the_model_can_not_answer(message: str, outcome: Outcome) -> None:
    error = ModelError(message)
    assert (error.outcome, error.reason, str(error)) == (outcome, "engine_failed", message)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (Outcome.STALLED, "engine_failed"),
        (Outcome.FIRST_TOKEN_TIMEOUT, "engine_failed"),
        (Outcome.OVERLOADED, "overloaded"),
        (Outcome.REQUEST_TIMEOUT, "timeout"),
    ],
)
def test_who_knows_better_says_so(outcome: Outcome, reason: str) -> None:
    error = ModelError("no token for 3 s", outcome)
    assert (error.outcome, error.reason, str(error)) == (outcome, reason, "no token for 3 s")
    assert ModelError("no token [invalid]", outcome).outcome is outcome
