"""failsafe/failsafe.py between scripted models: when the decoder is asked again, and when the breaker forbids it."""

from __future__ import annotations

import pytest

from helpers.two_models import HANG, PATIENCE, STUB_DIED, UNLOADED, Gate, Last, end, until, world


def test_without_a_fallback_the_decoder_is_asked_again() -> None:
    with world(fallback="") as it:
        it.models.scripts["decoder"] = [[UNLOADED], [[1], STUB_DIED], [Last([2])]]
        caller = it.submit()
        assert end(caller.end()) == ("decoder", "")
        assert caller.token_ids == [1, 2]
        assert [call.order.resume_ids for call in it.models.calls] == [[], [], [1]]
        assert len({call.order.request_id for call in it.models.calls}) == 3
        assert it.sample("retries_total") == 2
        assert it.sample("resumed_total") == 1


def test_it_is_asked_as_often_as_the_policy_says() -> None:
    with world(retry_max_attempts=3) as it:
        it.says(fallback="the engine is starting")
        it.models.scripts["decoder"] = [[UNLOADED]]
        caller = it.submit()
        assert caller.end() is None
        assert (caller.error, caller.reason) == (UNLOADED, "engine_failed")
        assert [call.model for call in it.models.calls] == ["decoder"] * 3
        assert it.sample("retries_refused_total", "attempts") == 1


def test_it_is_asked_as_often_as_the_budget_allows() -> None:
    with world(fallback="", retry_max_attempts=10, retry_budget_burst=2, retry_budget_floor=1e-9) as it:
        it.models.scripts["decoder"] = [[UNLOADED]]
        assert it.submit().end() is None
        assert len(it.models.calls) == 3
        assert it.sample("retries_refused_total", "budget") == 1
        assert it.sample("retry_budget") < 1


def test_each_request_pays_its_share_of_the_budget() -> None:
    with world(fallback="", retry_budget_burst=1, retry_budget_share=1, retry_budget_floor=0) as it:
        it.models.scripts["decoder"] = [[UNLOADED], [Last([1])]] * 2
        assert [end(it.submit().end()) for _ in range(2)] == [("decoder", "")] * 2
        assert it.sample("retries_total") == 2


def test_it_is_not_asked_again_if_there_is_no_time_left_for_it() -> None:
    with world(fallback="", retry_min_time=100) as it:
        it.models.scripts["decoder"] = [[UNLOADED]]
        assert it.submit(timeout=50).end() is None
        assert len(it.models.calls) == 1
        assert it.sample("retries_refused_total", "deadline") == 1


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


def test_the_breaker_opens_after_failures_and_a_probe_closes_it() -> None:
    with world(breaker_consecutive_failures=2, breaker_cool_down=30) as it:
        it.models.scripts["decoder"] = [["it broke [engine_failed]"]] * 2 + [[Last([1])]]
        assert [end(it.submit().end())[1] for _ in range(3)] == ["engine_failed", "engine_failed", "breaker_open"]
        assert len(it.models.of("decoder")) == 2
        assert it.sample("breaker_state", "open") == 1
        it.passes(31)
        assert end(it.submit().end()) == ("decoder", "")
        until(lambda: it.sample("breaker_state", "closed"))
        assert it.sample("breaker_transitions_total", "half_open_closed") == 1


def test_a_probe_proves_itself_with_its_first_token() -> None:
    with world(breaker_consecutive_failures=1, breaker_cool_down=30) as it:
        gates = Gate(), Gate()
        it.models.scripts["decoder"] = [["it broke [engine_failed]"], [gates[0], [], gates[1], [1], HANG], [Last([2])]]
        it.submit().end()
        it.passes(31)
        probe = it.submit("probe")
        gates[0].open()
        assert gates[1].reached.wait(PATIENCE)  # a response without a token proves nothing
        assert end(it.submit().end()) == ("fallback", "breaker_open")
        gates[1].open()
        probe.has(1)
        until(lambda: it.sample("breaker_state", "closed"))
        assert end(it.submit().end()) == ("decoder", "")
        it.failsafe.cancel("probe")


def test_a_probe_that_fails_opens_it_again() -> None:
    with world(breaker_consecutive_failures=1, breaker_cool_down=20) as it:
        it.models.scripts["decoder"] = [["it broke [engine_failed]"]]
        it.submit().end()
        it.passes(21)
        assert end(it.submit().end()) == ("fallback", "engine_failed")
        assert it.sample("breaker_transitions_total", "half_open_open") == 1


def test_an_open_breaker_without_a_fallback_says_when_to_come_again() -> None:
    with world(fallback="", breaker_consecutive_failures=1, breaker_cool_down=30) as it:
        it.models.scripts["decoder"] = [["it broke [engine_failed]"]]
        it.submit().end()
        caller = it.submit()
        assert caller.end() is None
        assert caller.reason == "engine_failed"
        assert caller.error.startswith("the model failed too often to be asked now; try again in ")
        assert len(it.models.calls) == 1
