"""failsafe/failsafe.py between scripted models: which model answers, and what the caller gets.

Each world checks at its end that every request ended once, and that every permit of the breaker came back once.
"""

from __future__ import annotations

from typing import Any

import pytest

from helpers.two_models import RESTARTING, SILENT, STUB_DIED, UNLOADED, Last, Sent, end, world
from tidewright.schema import ATTEMPT


def test_the_decoder_answers() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[[1], [2], Last([3])]]
        caller = it.submit(max_tokens=7)
        caller.end()
        assert caller.sent == [
            Sent([1], False, "decoder", "", True),
            Sent([2], False, "decoder", "", False),
            Sent([3], True, "decoder", "", True),
        ]
        [call] = it.models.calls
        assert call.model == "decoder"
        assert call.order.request_id.startswith(f"client{ATTEMPT}")
        assert (call.order.sampling.max_tokens, call.order.resume_ids) == (7, [])
        assert it.sample("outcomes_total", "success") == 1
        assert it.sample("requests_served_total", "decoder") == 1


@pytest.mark.parametrize(
    ("error", "label"),
    [
        ("no memory is left [engine_failed]", "engine_failed"),
        ("too many requests [overloaded]", "overloaded"),
        (UNLOADED, "unavailable"),
        (STUB_DIED, "stub_died"),
    ],
)
@pytest.mark.parametrize("streams", [True, False])
def test_the_fallback_answers_where_the_decoder_fails(error: str, label: str, streams: bool) -> None:
    with world() as it:
        it.models.scripts = {"decoder": [[error]], "fallback": [[[1], Last([2])]]}
        caller = it.submit(streams=streams)
        assert end(caller.end()) == ("fallback", label)
        assert caller.sent[0] == Sent([1], False, "fallback", label, True)
        assert [call.order.resume_ids for call in it.models.calls] == [[], []]
        assert it.sample("fallbacks_total", label) == 1
        assert it.sample("outcomes_total", label) == 1
        assert it.sample("resumed_total") == 0


def test_a_stream_without_a_last_response_has_failed() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[[1]]]
        caller = it.submit()
        assert end(caller.end()) == ("fallback", "unavailable")
        assert caller.token_ids == [1, 2]


def test_the_fallback_goes_on_behind_what_the_caller_has() -> None:
    with world() as it:
        it.models.scripts = {"decoder": [[[1, 2], [], [3], "it broke [engine_failed]"]], "fallback": [[[4], Last([5])]]}
        caller = it.submit(max_tokens=9)
        assert end(caller.end()) == ("fallback", "engine_failed")
        assert caller.token_ids == [1, 2, 3, 4, 5]
        assert [sent.names for sent in caller.sent] == [True, False, False, True, True]
        order = it.models.of("fallback")[0].order
        assert (order.resume_ids, order.sampling.max_tokens) == ([1, 2, 3], 9)
        assert it.sample("resumed_total") == 1


@pytest.mark.parametrize("sampling", [{"n": 2}, {"guided_regex": "a+"}])
def test_what_can_not_be_continued_fails_once_it_has_tokens(sampling: dict[str, Any]) -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[[1, 2], "it broke [overloaded]"]]
        caller = it.submit(**sampling)
        assert caller.end() is None
        assert (caller.error, caller.reason) == ("it broke, after 2 tokens", "engine_failed")
        assert not it.models.of("fallback")


@pytest.mark.parametrize("sampling", [{"n": 2}, {"guided_regex": "a+"}])
def test_what_can_not_be_continued_can_begin_elsewhere(sampling: dict[str, Any]) -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[[], "it broke [engine_failed]"]]
        assert end(it.submit(**sampling).end()) == ("fallback", "engine_failed")


@pytest.mark.parametrize("settings", [{}, {"degradation": True}])
def test_the_fallback_never_answers_for_an_adapter(settings: dict[str, Any]) -> None:
    with world(retry_max_attempts=1, **settings) as it:
        it.models.scripts["decoder"] = [["no memory is left [engine_failed]"]]
        caller = it.submit(lora_name="sql")
        assert caller.end() is None
        assert (caller.error, caller.reason) == ("no memory is left", "engine_failed")
        assert not it.models.of("fallback")


def test_a_stream_may_not_be_continued_if_the_settings_say_so() -> None:
    with world(failsafe_resume="fail") as it:
        it.models.scripts["decoder"] = [[[1], UNLOADED], [UNLOADED]]
        caller = it.submit()
        assert caller.end() is None
        assert (caller.error, caller.reason) == (f"{UNLOADED}, after 1 tokens", "engine_failed")
        assert end(it.submit().end()) == ("fallback", "unavailable")


@pytest.mark.parametrize("reason", ["invalid", "cancelled", "timeout"])
@pytest.mark.parametrize("before", [[], [[1]]])
def test_what_the_fallback_would_say_as_well_is_passed_on(reason: str, before: list[Any]) -> None:
    with world(breaker_consecutive_failures=1) as it:
        it.models.scripts["decoder"] = [[*before, f"so it is [{reason}]"]]
        caller = it.submit()
        assert caller.end() is None
        assert (caller.error, caller.reason) == ("so it is", reason)
        assert not it.models.of("fallback")
        assert it.sample("requests_failed_total", reason) == 1
        assert it.sample("breaker_state", "closed") == 1


def test_a_fallback_that_fails_too_makes_one_error_that_names_both() -> None:
    with world(retry_max_attempts=1) as it:
        it.models.scripts = {"decoder": [["it broke [engine_failed]"]], "fallback": [["no room [overloaded]"]]}
        caller = it.submit()
        assert caller.end() is None
        assert caller.error == "neither the decoder (engine_failed) nor the fallback can answer: no room"
        assert caller.reason == "overloaded"


def test_what_the_fallback_alone_refuses_is_not_the_callers_fault() -> None:
    with world() as it:
        it.models.scripts = {"decoder": [[UNLOADED]], "fallback": [["the prompt is too long [invalid]"]]}
        caller = it.submit()
        assert caller.end() is None
        assert caller.reason == "engine_failed"
        assert "nor the fallback can answer: the prompt is too long" in caller.error


@pytest.mark.parametrize("reason", ["cancelled", "timeout"])
def test_an_end_in_the_fallback_is_an_end(reason: str) -> None:
    with world() as it:
        it.models.scripts = {"decoder": [[UNLOADED]], "fallback": [[[1], f"so it is [{reason}]"]]}
        caller = it.submit()
        assert caller.end() is None
        assert (caller.error, caller.reason) == ("so it is", reason)


@pytest.mark.parametrize(
    ("answer", "label"), [(SILENT, "stalled"), (STUB_DIED, "stub_died"), (UNLOADED, "unavailable")]
)
def test_a_trouble_that_lasts_leads_to_the_fallback_at_once(answer: Any, label: str) -> None:
    with world(failsafe_patience=0.5) as it:
        it.says(answer)
        it.passes(1)
        assert end(it.submit().end()) == ("fallback", label)
        assert not it.models.of("decoder")
        assert not it.failsafe._breaker.given  # type: ignore[attr-defined]
        assert it.failsafe.trouble == ""


def test_a_trouble_that_is_new_is_given_time() -> None:
    with world() as it:
        it.says(RESTARTING)
        assert end(it.submit().end()) == ("decoder", "")


def test_without_a_fallback_a_decoder_in_trouble_is_asked() -> None:
    with world(fallback="", failsafe_patience=0.5) as it:
        assert it.failsafe.trouble == ""
        it.says(SILENT)
        assert end(it.submit().end()) == ("decoder", "")
        assert it.failsafe.trouble == "decoder: no sign of life for 1000.0 s"


def test_a_fallback_that_is_not_ready_is_not_asked() -> None:
    with world() as it:
        it.says(SILENT, fallback="the engine is starting")
        assert end(it.submit().end()) == ("decoder", "")
        assert it.failsafe.trouble
