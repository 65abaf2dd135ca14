"""resilience/breaker.py among many threads and tasks."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from helpers.breakers import CONFIG, call, opened, permitted, refused
from tidewright.resilience.breaker import MAX_REPORTS, CircuitBreaker, Permit, State
from tidewright.resilience.outcome import Outcome


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns as often as the interpreter can, or a race would hardly ever be seen."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_switching")
def test_of_many_threads_one_gets_the_probe() -> None:
    threads, rounds = 16, 100
    barrier = threading.Barrier(threads)
    breakers = [opened() for _ in range(rounds)]

    def one_thread() -> int:
        probes = 0
        for breaker in breakers:
            barrier.wait(timeout=60)
            probes += isinstance(breaker.acquire(1.0), Permit)
        return probes

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(one_thread) for _ in range(threads)]
    assert sum(future.result() for future in futures) == rounds


@pytest.mark.usefixtures("eager_switching")
def test_no_result_of_many_threads_is_lost() -> None:
    threads, calls = 8, 2000
    breaker = CircuitBreaker(replace(CONFIG, consecutive_failures=10**9, min_calls=10**9))

    def one_thread(number: int) -> None:
        for _ in range(calls):
            call(breaker, Outcome.SUCCESS if number % 2 else Outcome.ENGINE_FAILED)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one_thread, range(threads)))
    snapshot = breaker.snapshot(0.0)
    assert (snapshot.window_calls, snapshot.window_failures) == (threads * calls, threads * calls // 2)


@pytest.mark.usefixtures("eager_switching")
def test_failures_of_many_threads_open_it_once() -> None:
    threads, rounds = 8, 200
    barrier = threading.Barrier(threads)
    breakers = [CircuitBreaker(replace(CONFIG, consecutive_failures=2)) for _ in range(rounds)]

    def one_thread() -> None:
        for breaker in breakers:
            permit = permitted(breaker, 0.0)
            barrier.wait(timeout=60)
            breaker.record(permit, Outcome.ENGINE_FAILED, 0.0)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(one_thread) for _ in range(threads)]:
            future.result()
    assert [breaker.snapshot(0.0).generation for breaker in breakers] == [1] * rounds


class Meanwhile:
    """A lock around which another thread does something: before it is first taken, or before it is first released."""

    def __init__(
        self,
        breaker: CircuitBreaker,
        before: Callable[[], object] = lambda: None,
        at_the_end: Callable[[], object] = lambda: None,
    ) -> None:
        self.breaker, self.lock, self.before, self.at_the_end = breaker, breaker._lock, before, at_the_end
        breaker._lock = self

    def acquire(self, blocking: bool = True) -> bool:
        action, self.before = self.before, lambda: None
        action()
        return self.lock.acquire(blocking)

    def release(self) -> None:
        action, self.at_the_end = self.at_the_end, lambda: None
        action()
        self.lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def test_who_waited_for_the_lock_sees_that_another_has_the_probe() -> None:
    breaker = opened()
    Meanwhile(breaker, before=lambda: permitted(breaker, 1.0))
    assert refused(breaker, 1.0) == 4.0


def test_who_waited_for_the_lock_sees_that_it_is_closed() -> None:
    breaker = opened()
    Meanwhile(breaker, before=lambda: call(breaker, Outcome.SUCCESS, 1.0))
    assert not permitted(breaker, 1.0).is_probe


@pytest.mark.timeout(20)
def test_a_report_does_not_wait_for_the_lock_and_its_holder_takes_it_in() -> None:
    breaker = opened()
    probe = permitted(breaker, 1.0)
    with breaker._lock:
        breaker.record(probe, Outcome.SUCCESS, 1.0)
        assert breaker.state is State.HALF_OPEN
    assert breaker.snapshot(1.0).state is State.CLOSED


@pytest.mark.timeout(20)
def test_a_report_that_was_left_to_others_counts_before_the_next_probe_is_given_away() -> None:
    breaker = opened()
    probe = permitted(breaker, 1.0)
    with breaker._lock:
        breaker.record(probe, Outcome.ENGINE_FAILED, 5.0)
    assert refused(breaker, 5.0) == 2.0  # the probe's time is up, but it failed: the cool-down is longer


@pytest.mark.timeout(20)
@pytest.mark.parametrize("use", ["record", "acquire", "snapshot"])
def test_no_report_is_left_behind_when_the_lock_is_released(use: str) -> None:
    breaker = opened(replace(CONFIG, probe_timeout=1.0))
    lost, probe = permitted(breaker, 1.0), permitted(breaker, 2.0)
    Meanwhile(breaker, at_the_end=lambda: breaker.record(probe, Outcome.SUCCESS, 2.0))
    if use == "record":
        breaker.record(lost, Outcome.SUCCESS, 2.0)
        assert breaker.state is State.CLOSED
    elif use == "snapshot":
        assert breaker.snapshot(2.0).state is State.HALF_OPEN
        assert breaker.state is State.CLOSED
    else:
        # Set back, the clock leads past the gate to the lock.
        assert refused(breaker, 1.5) == 1.0
        assert breaker.state is State.CLOSED


def test_only_with_too_many_reports_left_does_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    breaker, asked = CircuitBreaker(CONFIG), []

    class Taken:
        def acquire(self, blocking: bool = True) -> bool:
            asked.append(blocking)
            return False

    with monkeypatch.context() as patch:
        patch.setattr(breaker, "_lock", Taken())
        for _ in range(MAX_REPORTS + 1):
            call(breaker, Outcome.SUCCESS)
    assert asked == [False] * MAX_REPORTS + [True]
    assert breaker.snapshot(0.0).window_calls == MAX_REPORTS + 1


def test_of_many_tasks_one_gets_the_probe() -> None:
    breaker = opened()

    async def caller() -> bool:
        decision = breaker.acquire(1.0)
        await asyncio.sleep(0)
        if isinstance(decision, Permit):
            breaker.record(decision, Outcome.SUCCESS, 1.0)
            return True
        return False

    async def main() -> list[bool]:
        return await asyncio.gather(*(caller() for _ in range(1000)))

    assert sum(asyncio.run(main())) == 1
    assert breaker.state is State.CLOSED
