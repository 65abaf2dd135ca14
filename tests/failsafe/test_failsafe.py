"""failsafe/failsafe.py between scripted models: who answers, what the caller gets, and what the models are asked.

Each world checks at its end that every request ended once, and that every permit of the breaker came back once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from helpers.two_models import (
    HANG,
    PATIENCE,
    SILENT,
    STUB_DIED,
    UNLOADED,
    WELL,
    Caller,
    Gate,
    Last,
    Models,
    Sent,
    until,
    world,
)
from tidewright.failsafe import failsafe, pulse
from tidewright.failsafe.models import ModelError, Reply
from tidewright.schema import ATTEMPT, CANCEL, FinishReason

RESTARTING = msgspec.structs.replace(WELL, trouble="the engine is starting")
FIRST_TOKEN_TIMEOUT, STALL_TIMEOUT = 30.0, 10.0


def end(answer: Sent | None) -> tuple[str, str]:
    assert answer
    return answer.served_by, answer.fallback_reason


# Who answers.


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
        assert it.figure("outcomes_total", "success") == 1
        assert it.figure("requests_served_total", "decoder") == 1


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
        assert it.figure("fallbacks_total", label) == 1
        assert it.figure("outcomes_total", label) == 1
        assert it.figure("resumed_total") == 0


def test_a_stream_without_a_last_response_has_failed() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[[1]]]
        caller = it.submit()
        assert end(caller.end()) == ("fallback", "unavailable")
        assert caller.token_ids == [1, 2]


def test_the_fallback_goes_on_behind_what_the_caller_has() -> None:
    with world() as it:
        it.models.scripts = {
            "decoder": [[[1, 2], [], [3], "it broke [engine_failed]"]],
            "fallback": [[[4], Last([5])]],
        }
        caller = it.submit(max_tokens=9)
        assert end(caller.end()) == ("fallback", "engine_failed")
        assert caller.token_ids == [1, 2, 3, 4, 5]
        assert [sent.names for sent in caller.sent] == [True, False, False, True, True]
        order = it.models.of("fallback")[0].order
        assert (order.resume_ids, order.sampling.max_tokens) == ([1, 2, 3], 9)
        assert it.figure("resumed_total") == 1


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
        assert it.figure("requests_failed_total", reason) == 1
        assert it.figure("breaker_state", "closed") == 1


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


# Retries.


def test_without_a_fallback_the_decoder_is_asked_again() -> None:
    with world(fallback="") as it:
        it.models.scripts["decoder"] = [[UNLOADED], [[1], STUB_DIED], [Last([2])]]
        caller = it.submit()
        assert end(caller.end()) == ("decoder", "")
        assert caller.token_ids == [1, 2]
        assert [call.order.resume_ids for call in it.models.calls] == [[], [], [1]]
        assert len({call.order.request_id for call in it.models.calls}) == 3
        assert it.figure("retries_total") == 2
        assert it.figure("resumed_total") == 1


def test_it_is_asked_as_often_as_the_policy_says() -> None:
    with world(retry_max_attempts=3) as it:
        it.says(fallback="the engine is starting")
        it.models.scripts["decoder"] = [[UNLOADED]]
        caller = it.submit()
        assert caller.end() is None
        assert (caller.error, caller.reason) == (UNLOADED, "engine_failed")
        assert [call.model for call in it.models.calls] == ["decoder"] * 3
        assert it.figure("retries_refused_total", "attempts") == 1


def test_it_is_asked_as_often_as_the_budget_allows() -> None:
    with world(fallback="", retry_max_attempts=10, retry_budget_burst=2, retry_budget_floor=1e-9) as it:
        it.models.scripts["decoder"] = [[UNLOADED]]
        assert it.submit().end() is None
        assert len(it.models.calls) == 3
        assert it.figure("retries_refused_total", "budget") == 1
        assert it.figure("retry_budget") < 1


def test_each_request_pays_its_share_of_the_budget() -> None:
    with world(fallback="", retry_budget_burst=1, retry_budget_share=1, retry_budget_floor=0) as it:
        it.models.scripts["decoder"] = [[UNLOADED], [Last([1])]] * 2
        assert [end(it.submit().end()) for _ in range(2)] == [("decoder", "")] * 2
        assert it.figure("retries_total") == 2


def test_it_is_not_asked_again_if_there_is_no_time_left_for_it() -> None:
    with world(fallback="", retry_min_time=100) as it:
        it.models.scripts["decoder"] = [[UNLOADED]]
        assert it.submit(timeout=50).end() is None
        assert len(it.models.calls) == 1
        assert it.figure("retries_refused_total", "deadline") == 1


@pytest.mark.parametrize("error", ["it broke [engine_failed]", "too many [overloaded]"])
def test_it_is_not_asked_again_where_that_helps_nobody(error: str) -> None:
    with world(fallback="") as it:
        it.models.scripts["decoder"] = [[error]]
        caller = it.submit()
        assert caller.end() is None
        assert f"{caller.error} [{caller.reason}]" == error
        assert len(it.models.calls) == 1


def test_an_open_breaker_ends_the_retries() -> None:
    with world(fallback="", breaker_consecutive_failures=2, retry_max_attempts=9, breaker_cool_down=30) as it:
        it.models.scripts["decoder"] = [[UNLOADED]]
        caller = it.submit()
        assert caller.end() is None
        assert caller.error == UNLOADED
        assert len(it.models.calls) == 2


def test_the_decoder_is_asked_again_when_the_fallback_fails() -> None:
    with world() as it:
        it.models.scripts = {"decoder": [[UNLOADED], [Last([1])]], "fallback": [["it is gone"]]}
        assert end(it.submit().end()) == ("decoder", "")
        assert [call.model for call in it.models.calls] == ["decoder", "fallback", "decoder"]


# What is known before.


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


# The breaker.


def test_the_breaker_opens_after_failures_and_a_probe_closes_it() -> None:
    with world(breaker_consecutive_failures=2, breaker_cool_down=30) as it:
        it.models.scripts["decoder"] = [["it broke [engine_failed]"]] * 2 + [[Last([1])]]
        assert [end(it.submit().end())[1] for _ in range(3)] == ["engine_failed", "engine_failed", "breaker_open"]
        assert len(it.models.of("decoder")) == 2
        assert it.figure("breaker_state", "open") == 1
        it.passes(31)
        assert end(it.submit().end()) == ("decoder", "")
        until(lambda: it.figure("breaker_state", "closed"))
        assert it.figure("breaker_transitions_total", "half_open_closed") == 1


def test_a_probe_proves_itself_with_its_first_token() -> None:
    with world(breaker_consecutive_failures=1, breaker_cool_down=30) as it:
        gates = Gate(), Gate()
        it.models.scripts["decoder"] = [
            ["it broke [engine_failed]"],
            [gates[0], [], gates[1], [1], HANG],
            [Last([2])],
        ]
        it.submit().end()
        it.passes(31)
        probe = it.submit("probe")
        gates[0].open()
        assert gates[1].reached.wait(PATIENCE)  # a response without a token proves nothing
        assert end(it.submit().end()) == ("fallback", "breaker_open")
        gates[1].open()
        probe.has(1)
        until(lambda: it.figure("breaker_state", "closed"))
        assert end(it.submit().end()) == ("decoder", "")
        it.failsafe.cancel("probe")


def test_a_probe_that_fails_opens_it_again() -> None:
    with world(breaker_consecutive_failures=1, breaker_cool_down=20) as it:
        it.models.scripts["decoder"] = [["it broke [engine_failed]"]]
        it.submit().end()
        it.passes(21)
        assert end(it.submit().end()) == ("fallback", "engine_failed")
        assert it.figure("breaker_transitions_total", "half_open_open") == 1


def test_an_open_breaker_without_a_fallback_says_when_to_come_again() -> None:
    with world(fallback="", breaker_consecutive_failures=1, breaker_cool_down=30) as it:
        it.models.scripts["decoder"] = [["it broke [engine_failed]"]]
        it.submit().end()
        caller = it.submit()
        assert caller.end() is None
        assert caller.reason == "engine_failed"
        assert caller.error.startswith("the model failed too often to be asked now; try again in ")
        assert len(it.models.calls) == 1


# The monitor.


def test_a_first_token_that_does_not_come() -> None:
    with world() as it:
        gate = Gate()
        it.models.scripts["decoder"] = [[[], gate, HANG]]
        caller = it.submit()
        assert gate.reached.wait(PATIENCE)
        gate.open()
        it.look()
        assert not it.models.of("fallback")
        it.passes(FIRST_TOKEN_TIMEOUT)
        assert end(caller.end()) == ("fallback", "first_token_timeout")
        assert it.figure("outcomes_total", "first_token_timeout") == 1


def test_in_a_queue_the_first_token_is_late_for_the_load() -> None:
    with world() as it:
        it.says(msgspec.structs.replace(WELL, waiting=0.01))
        it.models.scripts["decoder"] = [[HANG]]
        caller = it.submit()
        it.passes(FIRST_TOKEN_TIMEOUT)
        assert end(caller.end()) == ("fallback", "overloaded")
        assert it.figure("outcomes_total", "overloaded") == 1


def test_a_stream_that_stalls_goes_on_elsewhere_and_is_cancelled() -> None:
    with world() as it:
        gate = Gate()
        it.models.scripts = {"decoder": [[[1], gate, [2], Last([3])]], "fallback": [[Last([4])]]}
        caller = it.submit()
        assert gate.reached.wait(PATIENCE)
        it.look()
        assert not it.models.of("fallback")
        it.passes(STALL_TIMEOUT)
        assert end(caller.end()) == ("fallback", "stalled")
        decoder, fallback = it.models.calls
        assert fallback.order.resume_ids == [1]
        until(lambda: it.models.cancels)
        assert it.models.cancels == [("decoder", decoder.order.request_id)]
        gate.open()
        assert decoder.over.wait(PATIENCE)
        assert caller.token_ids == [1, 4]
        assert it.figure("requests_served_total", "decoder") == 0


def test_what_was_abandoned_may_break_as_it_likes() -> None:
    def breaks() -> None:
        raise ValueError("a mistake")

    with world() as it:
        gate, other = Gate(), Gate()
        it.models.scripts = {"decoder": [[[1], gate, [9], breaks]], "fallback": [[[2], other, Last([3])]]}
        caller = it.submit()
        caller.has(1)
        it.passes(STALL_TIMEOUT)
        caller.has(1, 2)
        gate.open()
        assert it.models.of("decoder")[0].over.wait(PATIENCE)
        it.look()
        other.open()
        assert end(caller.end()) == ("fallback", "stalled")
        assert caller.token_ids == [1, 2, 3]


def test_a_mistake_ends_the_request_unless_it_has_ended() -> None:
    def breaks() -> None:
        raise ValueError("a mistake")

    with world() as it:
        it.models.scripts["decoder"] = [[[1], breaks], [Last([1]), breaks]]
        caller = it.submit()
        assert caller.end() is None
        assert (caller.error, caller.reason) == ("internal error; see the server's log", "engine_failed")
        assert end(it.submit().end()) == ("decoder", "")
        it.models.release()
        it.look()


@pytest.mark.parametrize("answer", [SILENT, STUB_DIED])
def test_a_trouble_that_gets_known_moves_who_is_there(answer: Any) -> None:
    with world() as it:
        it.models.scripts = {"decoder": [[[1], HANG], [HANG]], "fallback": [[Last([2])]]}
        streams, waits = it.submit(), it.submit(streams=False)
        streams.has(1)
        until(lambda: len(it.models.of("decoder")) == 2)
        it.says(answer)
        label = "stalled" if answer is SILENT else "stub_died"
        assert [end(caller.end()) for caller in (streams, waits)] == [("fallback", label)] * 2
        assert streams.token_ids == [1, 2]
        it.look()
        # Whom nobody answers, nobody asks to cancel.
        until(lambda: len(it.models.cancels) == (2 if answer is SILENT else 0))


def test_a_decoder_that_starts_again_keeps_the_streams_that_it_has() -> None:
    with world(failsafe_patience=0.5) as it:
        it.models.scripts["decoder"] = [[[1], HANG], [HANG], [HANG]]
        keeps = it.submit("stays")
        keeps.has(1)
        moves = it.submit()
        it.says(RESTARTING)
        it.passes(5)
        assert end(moves.end()) == ("fallback", "unavailable")
        it.look()
        assert not keeps.ends
        it.passes(STALL_TIMEOUT)
        assert end(keeps.end()) == ("fallback", "unavailable")


def test_an_unloaded_decoder_ends_what_it_has() -> None:
    with world() as it:
        gate = Gate()
        it.models.scripts["decoder"] = [[[1], gate, Last([2])]]
        caller = it.submit()
        caller.has(1)
        it.says(UNLOADED)
        gate.open()
        assert end(caller.end()) == ("decoder", "")


def test_without_a_fallback_nobody_leaves_a_decoder_that_has_the_request() -> None:
    with world(fallback="") as it:
        gate = Gate()
        it.models.scripts["decoder"] = [[[1], gate, Last([2])]]
        caller = it.submit()
        caller.has(1)
        it.says(SILENT)
        it.passes(1000)
        it.look()
        gate.open()
        assert end(caller.end()) == ("decoder", "")


def test_who_hangs_up_is_let_go() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[[1], HANG], [HANG]]
        first, second = it.submit("first"), it.submit("second", streams=False)
        until(lambda: len(it.models.calls) == 2)
        first.hung_up = True
        assert first.end() is None
        assert (first.error, first.reason) == ("cancelled by the client", "cancelled")
        assert it.figure("outcomes_total", "cancelled") == 1
        assert not second.ends
        second.hung_up = True
        assert second.end() is None
        until(lambda: len(it.models.cancels) == 2)
        assert dict(it.models.cancels).keys() == {"decoder"}
        assert not it.models.of("fallback")


def test_a_request_is_cancelled_by_its_id_wherever_it_is() -> None:
    with world() as it:
        gate = Gate()
        it.models.scripts = {"decoder": [[HANG], [UNLOADED], [gate, Last()]], "fallback": [[HANG]]}
        callers = [it.submit("one")]
        until(lambda: len(it.models.of("decoder")) == 1)
        callers.append(it.submit("one"))
        until(lambda: it.models.of("fallback"))
        other = it.submit("other")
        assert it.failsafe.cancel("none") == 0
        assert it.failsafe.cancel("one") == 2
        for caller in callers:
            assert caller.end() is None
            assert (caller.error, caller.reason) == ("cancelled by its id", "cancelled")
        until(lambda: len(it.models.cancels) == 2)
        assert {model for model, _ in it.models.cancels} == {"decoder", "fallback"}
        assert it.failsafe.cancel("one") == 0
        gate.open()
        assert end(other.end()) == ("decoder", "")


def test_a_cancel_is_said_again_until_the_attempt_has_arrived() -> None:
    with world() as it:
        it.models.cancel_errors = iter([ModelError("no such id"), ModelError("no such id")])
        it.models.scripts["decoder"] = [[HANG]]
        caller = it.submit()
        until(lambda: it.models.calls)
        it.failsafe.cancel("client")
        caller.end()
        until(lambda: it.models.cancels)
        assert it.models.calls[0].over.wait(PATIENCE)


def test_a_mistake_does_not_end_the_cancels() -> None:
    with world() as it:
        it.models.cancel_errors = iter([ValueError("a mistake")] * 8)
        it.models.scripts["decoder"] = [[HANG]]
        it.submit()
        until(lambda: it.models.calls)
        it.failsafe.cancel("client")
        until(lambda: it.models.cancels)


def test_a_model_that_does_not_end_a_request_in_time() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[[1], HANG]]
        caller = it.submit(timeout=5)
        caller.has(1)
        it.passes(5)
        it.look()
        assert not caller.ends  # the model has a little time to end it by itself
        it.passes(1)
        assert caller.end() is None
        assert (caller.error, caller.reason) == ("timed out after 5 s", "timeout")
        until(lambda: it.models.cancels)


def test_each_attempt_gets_the_time_that_is_left() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[lambda: it.passes(50), UNLOADED]]
        it.submit(timeout=90).end()
        decoder, fallback = (call.order.sampling.timeout for call in it.models.calls)
        assert decoder
        assert fallback
        assert 60 < decoder <= 90
        assert 10 < fallback <= decoder - 50


def test_nothing_is_begun_for_a_request_whose_time_is_up() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[lambda: it.passes(50), UNLOADED]]
        caller = it.submit(timeout=50)
        assert caller.end() is None
        assert caller.reason == "timeout"
        assert caller.error.startswith("timed out after 50 s")
        assert not it.models.of("fallback")


def test_a_retry_that_still_waits_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failsafe.random, "random", lambda: 0.5)
    with world(retry_base_delay=60, retry_max_delay=60) as it:
        it.says(fallback="the engine is starting")
        it.models.scripts["decoder"] = [[UNLOADED]]
        caller = it.submit()
        until(lambda: it.figure("retries_total"))
        it.says(SILENT)
        assert not caller.ends  # it does not wait for the decoder yet
        it.failsafe.cancel("client")
        assert caller.end() is None
        assert caller.reason == "cancelled"
        assert len(it.models.calls) == 1
    assert it.models.cancel_tries == 0  # the sweepers have ended, and had nothing to do


# Load.


def test_short_answers() -> None:
    with world(degradation=True, degrade_max_tokens=10) as it:
        it.says(msgspec.structs.replace(WELL, waiting=0.3))
        for _ in range(2):
            it.submit(max_tokens=100, min_tokens=50).end()
            it.models.scripts["decoder"] = [[UNLOADED]]
        assert [call.model for call in it.models.calls] == ["decoder", "decoder", "fallback"]
        for call in it.models.calls:
            assert (call.order.sampling.max_tokens, call.order.sampling.min_tokens) == (10, 10)
        assert it.figure("degradation_level") == 1


def test_only_the_fallback() -> None:
    with world(degradation=True, degrade_max_tokens=10) as it:
        it.says(msgspec.structs.replace(WELL, kv_usage=0.99))
        caller = it.submit(max_tokens=100)
        assert end(caller.end()) == ("fallback", "degraded")
        [call] = it.models.calls
        assert call.order.sampling.max_tokens == 10
        it.says(it.models.status, fallback="the engine is starting")
        assert end(it.submit().end()) == ("decoder", "")


def test_shed() -> None:
    with world(degradation=True) as it:
        it.says(msgspec.structs.replace(WELL, wait=31.0))
        caller = it.submit()
        assert caller.end() is None
        assert caller.reason == "overloaded"
        assert not it.models.calls
        assert it.figure("requests_failed_total", "overloaded") == 1


def test_it_is_off_by_default() -> None:
    with world(degrade_max_tokens=10) as it:
        it.says(msgspec.structs.replace(WELL, wait=31.0))
        assert end(it.submit(max_tokens=100).end()) == ("decoder", "")
        assert it.models.calls[0].order.sampling.max_tokens == 100
        assert it.figure("degradation_level") == 3


def test_a_dead_decoder_has_no_queue() -> None:
    """What it said last must not keep requests from the fallback for ever."""
    with world(degradation=True, degrade_dwell=10, failsafe_patience=0.5) as it:
        it.says(msgspec.structs.replace(WELL, wait=31.0))
        assert it.submit().end() is None
        it.says(STUB_DIED)
        for _ in range(3):
            it.look()
            it.passes(11)
        it.look()
        assert it.figure("degradation_level") == 0
        assert end(it.submit().end()) == ("fallback", "stub_died")


def test_too_many_at_once() -> None:
    with world(max_running=1, max_waiting=0) as it:
        it.models.scripts["decoder"] = [[HANG]]
        for number in range(2):
            it.submit(str(number))
        caller = it.submit("one too many")
        assert caller.end() is None
        assert caller.reason == "overloaded"
        assert caller.error == "2 requests are in flight already; try again later"
        until(lambda: len(it.models.calls) == 2)
        it.failsafe.cancel("0")
        it.models.scripts["decoder"] = [[Last()]]
        assert end(it.submit("again").end()) == ("decoder", "")
        it.failsafe.cancel("1")


def test_it_stops_though_the_models_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (failsafe, pulse):
        monkeypatch.setattr(module, "STOP_PATIENCE", 0.01)
    question, cancel = Gate(), Gate()
    with world() as it:
        it.models.scripts["decoder"] = [[HANG]]
        control = it.models.control

        def hangs(model: str, word: str) -> str:
            if word.startswith(CANCEL):
                cancel()
            elif model == "decoder":
                question()
            return control(model, word)

        it.submit()
        until(lambda: it.models.calls)
        it.failsafe._control = it.failsafe._pulse._control = hangs
        it.failsafe.cancel("client")
        assert question.reached.wait(PATIENCE)
        assert cancel.reached.wait(PATIENCE)
        it.failsafe.stop()
        assert it.failsafe._pulse._thread.is_alive()
        question.open()
        cancel.open()


# Once.


def test_a_request_that_has_ended_is_left_alone_even_if_its_stream_is_not_closed() -> None:
    with world(fallback="", retry_max_attempts=1) as it:
        begin, gate = Gate(), Gate()
        it.models.scripts["decoder"] = [[begin, Last([1]), gate, [2], Last([3])], [[4], HANG]]
        ended = it.submit("ended")
        [relay] = it.failsafe._relays
        begin.open()
        ended.end()
        other = it.submit("other")
        other.has(4)
        assert it.failsafe.cancel("ended") == 0
        it.says(STUB_DIED)
        assert other.end() is None
        it.failsafe._watch(relay)  # the monitor may have listed it before
        gate.open()
        assert ended.token_ids == [1]
        assert it.figure("requests_served_total", "decoder") == 1


class Interrupted:
    """A lock whose holder does not go on at once when it has let go."""

    def __init__(self, lock: threading.Condition) -> None:
        self._lock = lock
        self.wait_for, self.notify_all = lock.wait_for, lock.notify_all

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.02)


@pytest.mark.parametrize("fallback", ["auto", ""])
@pytest.mark.parametrize("error", ["", "it broke [engine_failed]"])
def test_who_hangs_up_at_once_is_told_so_once(fallback: str, error: str) -> None:
    with world(fallback=fallback, breaker_consecutive_failures=1, breaker_cool_down=30) as it:
        if error:  # from the second request on the breaker is open
            it.models.scripts["decoder"] = [[error]]
            it.submit().end()
        it.failsafe._changed = Interrupted(it.failsafe._changed)  # type: ignore[assignment]
        for _ in range(3):
            caller = Caller(it.models)
            caller.hung_up = True
            it.submit_for(caller).end()


@pytest.mark.parametrize("at", [1, 2])
def test_without_a_thread_for_an_attempt_the_request_ends(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    start, attempts = threading.Thread.start, iter(range(1, 9))

    def start_or_not(thread: threading.Thread) -> None:
        if thread.name == "attempt" and next(attempts) == at:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_not)
    with world() as it:
        it.models.scripts["decoder"] = [[HANG]]
        caller = it.submit()
        if at == 2:
            until(lambda: it.models.calls)
        it.passes(FIRST_TOKEN_TIMEOUT)
        assert caller.end() is None
        assert caller.reason == "overloaded"
        assert it.figure("breaker_state", "closed") == 1


class Broken(Caller):
    """Triton refuses to send."""

    def __init__(self, models: Models, *, at: Callable[[Reply], bool], fails: bool = False) -> None:
        super().__init__(models)
        self._at, self._fails = at, fails

    def send(self, reply: Reply, served_by: str, fallback_reason: str, names: bool) -> None:
        if self._at(reply):
            raise RuntimeError("no shared memory")
        super().send(reply, served_by, fallback_reason, names)

    def fail(self, message: str, reason: FinishReason) -> None:
        super().fail(message, reason)
        if self._fails:
            raise RuntimeError("no shared memory")


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("final", [True, False])
def test_a_response_that_can_not_be_sent(final: bool, fails: bool) -> None:
    with world(max_running=1, max_waiting=0) as it:
        it.models.scripts["decoder"] = [[[1], Last([2])]]
        for _ in range(3):
            caller = it.submit_for(Broken(it.models, at=lambda reply: reply.final == final, fails=fails))
            assert caller.end() is None
            until(lambda: not it.figure("requests_active"))
        assert (caller.error, caller.reason) == ("internal error; see the server's log", "engine_failed")


def test_an_error_that_can_not_be_sent_keeps_nobody_else_from_theirs() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[HANG]]
        callers = [it.submit_for(Broken(it.models, at=lambda _: False, fails=True)) for _ in range(2)]
        assert it.failsafe.cancel("client") == 2
        for caller in callers:
            assert caller.end() is None


def test_a_fallback_whose_stub_died_has_lost_its_requests() -> None:
    with world() as it:
        it.models.scripts = {"decoder": [[UNLOADED], [Last([2])]], "fallback": [[[1], HANG]]}
        caller = it.submit()
        caller.has(1)
        it.says(fallback="Stub process 'fallback_0_0' is not healthy.")
        assert end(caller.end()) == ("decoder", "")
        assert caller.token_ids == [1, 2]
        assert it.models.of("decoder")[1].order.resume_ids == [1]


def test_a_fallback_that_takes_nothing_new_ends_what_it_has() -> None:
    with world() as it:
        gate = Gate()
        it.models.scripts = {"decoder": [[UNLOADED]], "fallback": [[[1], gate, Last([2])]]}
        caller = it.submit()
        caller.has(1)
        it.says(fallback="draining: no new requests are taken")
        gate.open()
        assert end(caller.end()) == ("fallback", "unavailable")
