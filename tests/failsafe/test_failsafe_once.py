"""failsafe/failsafe.py between scripted models: each request ends once, whatever breaks or blocks on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from helpers.two_models import FIRST_TOKEN_TIMEOUT, HANG, PATIENCE, STUB_DIED, Caller, Gate, Last, Models, until, world
from tidewright.failsafe import failsafe, pulse
from tidewright.failsafe.models import ModelReply
from tidewright.schema import CANCEL, FinishReason


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
        assert it.sample("requests_served_total", "decoder") == 1


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
        assert it.sample("breaker_state", "closed") == 1


class Broken(Caller):
    """Triton refuses to send."""

    def __init__(self, models: Models, *, at: Callable[[ModelReply], bool], fails: bool = False) -> None:
        super().__init__(models)
        self._at, self._fails = at, fails

    def send(self, reply: ModelReply, served_by: str, fallback_reason: str, names: bool) -> None:
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
            until(lambda: not it.sample("requests_active"))
        assert (caller.error, caller.reason) == ("internal error; see the server's log", "engine_failed")


def test_an_error_that_can_not_be_sent_keeps_nobody_else_from_theirs() -> None:
    with world() as it:
        it.models.scripts["decoder"] = [[HANG]]
        callers = [it.submit_for(Broken(it.models, at=lambda _: False, fails=True)) for _ in range(2)]
        assert it.failsafe.cancel("client") == 2
        for caller in callers:
            assert caller.end() is None
