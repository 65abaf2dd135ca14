"""A decoder whose process dies, and is loaded again before Triton says so: nobody waits for what is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from helpers.two_models import HANG, PATIENCE, UNLOADED, WELL, Last, World, until, world
from tidewright.failsafe import pulse
from tidewright.schema import DecoderStatus

TOKENS = {"max_tokens": 8}


class Process:
    """In the place of the decoder's stub."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)

    @property
    def status(self) -> DecoderStatus:
        return msgspec.structs.replace(WELL, pid=self._process.pid)

    def kill(self) -> None:
        """Leaves a zombie, as Triton does with a stub that it has not unloaded."""
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    made = [Process(), Process()]
    yield made
    for process in made:
        process.close()


def started(w: World, count: int, **options: Any) -> list:
    """Streams that have a token of the decoder, and get no further one."""
    w.models.scripts["decoder"] = [[[1], HANG]] * count + [[Last([2])]]
    callers = [w.submit(f"client {number}", **options, **TOKENS) for number in range(count)]
    for caller in callers:
        caller.has(1)
    return callers


def test_the_fallback_goes_on_at_once(processes: list[Process]) -> None:
    first, second = processes
    with world() as w:
        w.says(first.status)
        callers = started(w, 3)
        w.models.status = second.status  # Triton never says that it died
        first.kill()
        for caller in callers:
            last = caller.end()
            assert last
            assert (last.served_by, last.fallback_reason, caller.token_ids) == ("fallback", "stub_died", [1, 2])


@pytest.mark.parametrize("meanwhile", [UNLOADED, "Stub process 'decoder_0_0' is not healthy."])
def test_without_a_fallback_all_of_them_wait_for_the_next_process(processes: list[Process], meanwhile: str) -> None:
    first, second = processes
    with world(fallback="", retry_budget_burst=1, retry_budget_floor=0, breaker_consecutive_failures=100) as w:
        w.says(first.status)
        callers = started(w, 12)
        w.models.status = meanwhile  # while it is loaded again
        first.kill()
        until(lambda: w.failsafe._pulse.decoder_is_gone)
        newcomer = w.submit("newcomer", **TOKENS)
        w.look()
        assert not any(caller.ends for caller in [*callers, newcomer])
        w.says(second.status)
        for caller in callers:
            assert caller.end()
            assert caller.token_ids == [1, 2]
        assert newcomer.end()
        assert all(call.order.resume_ids == [1] for call in w.models.of("decoder")[12:] if "new" not in str(call.order))


def test_a_decoder_that_was_unloaded_is_not_waited_for(processes: list[Process]) -> None:
    with world(fallback="") as w:
        w.says(processes[0].status)
        processes[0].close()
        w.says(UNLOADED)
        assert not w.failsafe._pulse.decoder_is_gone


def test_a_waiting_request_can_be_cancelled_and_times_out(processes: list[Process]) -> None:
    with world(fallback="") as w:
        w.says(processes[0].status)
        w.models.status = UNLOADED
        processes[0].kill()
        until(lambda: w.failsafe._pulse.decoder_is_gone)
        doomed, slow = w.submit("doomed"), w.submit("slow", timeout=5.0)
        w.look()
        assert w.failsafe.cancel("doomed") == 1
        w.passes(6)
        assert doomed.end() is slow.end() is None
        assert (doomed.reason, slow.reason) == ("cancelled", "timeout")
        w.says(processes[1].status)


def test_models_are_asked_seldom_while_nobody_waits_and_at_once_when_somebody_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with world() as w:
        w.feel()
        monkeypatch.setattr(pulse, "IDLE_INTERVAL", 10 * PATIENCE)
        w.look()
        w.look()
        asked = w.models.asked["decoder"]
        w.look()
        assert w.models.asked["decoder"] <= asked + 1
        w.models.scripts["decoder"] = [[HANG], [Last([1])]]
        caller = w.submit()
        until(lambda: w.models.asked["decoder"] > asked + 5)
        w.failsafe.cancel("client")
        assert caller.end() is None
        monkeypatch.setattr(pulse, "IDLE_INTERVAL", 0.001)
        w.submit().end()
