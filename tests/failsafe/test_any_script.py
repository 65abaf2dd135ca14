"""failsafe/failsafe.py, whatever the models do: each request ends once, and no token is lost or comes twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.two_models import HANG, SILENT, STUB_DIED, UNLOADED, WELL, Act, Caller, Last, World, world
from tidewright.failsafe.models import ModelReply, Order

MAX_TOKENS = 6
TOKENS = list(range(100, 100 + MAX_TOKENS))  # the answer to every request, whichever model gives it

ENDS = st.sampled_from(
    [
        "last",
        "nothing",
        HANG,
        "it broke [engine_failed]",
        "too many [overloaded]",
        "too late [timeout]",
        "wrong [invalid]",
        UNLOADED,
        STUB_DIED,
    ]
)
# For each attempt the sizes of its responses, and what comes then.
Plan = dict[str, list[tuple[list[int], str]]]
SCRIPTS = st.tuples(st.lists(st.integers(0, 2), max_size=4), ENDS)
PLANS = st.fixed_dictionaries({name: st.lists(SCRIPTS, max_size=3) for name in ("decoder", "fallback")})
STEPS = st.sampled_from(
    ["hang up", "cancel", "wait", "silent", "stub died", "unloaded", "well", "no fallback", "fallback died"]
)


class Answered(Caller):
    """Its models know the answer, and go on behind what they are given."""

    def __init__(self, it: World, plan: Plan) -> None:
        super().__init__(it.models)
        self._plan = {model: iter(scripts) for model, scripts in plan.items()}

    def generate(self, model: str, order: Order) -> Iterator[ModelReply]:
        assert order.resume_ids == self.token_ids[: len(order.resume_ids)]
        left = TOKENS[len(order.resume_ids) :]
        sizes, end = next(self._plan[model], ([], "last"))
        script: list[Act] = []
        for size in sizes:
            script.append(left[:size])
            left = left[size:]
        if end != "nothing":
            script.append(Last(left) if end == "last" else end)
        return self.models.play(model, order, script)


def take(it: World, step: str, callers: list[Answered]) -> None:
    if step == "hang up":
        callers[0].hung_up = True
    elif step == "cancel":
        it.failsafe.cancel("1")
    elif step == "wait":
        it.passes(31)
    elif step == "no fallback":
        it.says(it.models.status, fallback="the engine is starting")
    elif step == "fallback died":
        it.says(it.models.status, fallback=STUB_DIED)
    else:
        it.says({"silent": SILENT, "stub died": STUB_DIED, "unloaded": UNLOADED, "well": WELL}[step])


@settings(max_examples=30, deadline=None)
@given(
    plans=st.lists(PLANS, min_size=1, max_size=3),
    steps=st.lists(STEPS, max_size=3),
    fallback=st.sampled_from(["auto", ""]),
    resume=st.sampled_from(["continue", "fail"]),
    timeout=st.sampled_from([None, 20.0, 45.0]),
)
@pytest.mark.heavy
def test_every_request_ends_once_with_the_beginning_of_its_answer(
    plans: list[Plan],
    steps: list[str],
    fallback: str,
    resume: str,
    timeout: float | None,
) -> None:
    with world(fallback=fallback, failsafe_resume=resume, breaker_consecutive_failures=3, breaker_cool_down=20) as it:
        callers = [Answered(it, plan) for plan in plans]
        for number, caller in enumerate(callers):
            it.submit_for(caller, str(number), max_tokens=MAX_TOKENS, timeout=timeout)
        for step in steps:
            take(it, step, callers)
        it.look()
        for number, caller in enumerate(callers):
            it.failsafe.cancel(str(number))  # or some would hang for ever
            last = caller.end()
            assert caller.token_ids == (TOKENS if last else TOKENS[: len(caller.token_ids)])
            assert "internal error" not in caller.error
