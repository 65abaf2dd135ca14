"""failsafe/failsafe.py between scripted models: clients that hang up, cancels by id, and deadlines."""

from __future__ import annotations

import pytest

from helpers.two_models import HANG, PATIENCE, SILENT, UNLOADED, Gate, Last, end, until, world
from tidewright.failsafe import failsafe
from tidewright.resilience.errors import ModelError


def test_who_hangs_up_is_let_go() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[[1], HANG], [HANG]]
        first, second = it.submit("first"), it.submit("second", streams=False)
        until(lambda: len(it.models.calls) == 2)
        first.hung_up = True
        assert first.end() is None
        assert (first.error, first.reason) == ("cancelled by the client", "cancelled")
        assert it.sample("outcomes_total", "cancelled") == 1
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
        it.clock.stop()  # on a busy machine half a second passes before one looks
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
        until(lambda: it.sample("retries_total"))
        it.says(SILENT)
        assert not caller.ends  # it does not wait for the decoder yet
        it.failsafe.cancel("client")
        assert caller.end() is None
        assert caller.reason == "cancelled"
        assert len(it.models.calls) == 1
    assert it.models.cancel_tries == 0  # the sweepers have ended, and had nothing to do
