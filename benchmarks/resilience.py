"""What breaker and retries cost. `python -m benchmarks.resilience`; needs an idle machine, no model.

First the time of a breaker decision, and of a report, among many callers at once: threads as in the Triton models,
tasks as in a gateway. Each caller decides, calls for a while, reports, and begins again. With "no pause" the call takes
no time: all threads want the interpreter all the time, and one that loses it amid a decision waits for its next turn.
In the first case one call in fifty fails, so the breaker opens at times; without a pause all succeed, so all decide and
report.
Then calls with breaker and retries beside bare ones, taking turns, all healthy.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from tidewright.bench.sweep import percentile
from tidewright.resilience.breaker import CircuitBreaker, Permit, State
from tidewright.resilience.budget import RetryBudget
from tidewright.resilience.config import ResilienceSettings
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.outcome import Outcome, Verdict

FAILURE_RATE = 0.02
SETTINGS = ResilienceSettings(breaker_cool_down=0.01, breaker_consecutive_failures=2)


class Caller:
    """One of many; keeps the seconds that its decisions and its reports took."""

    def __init__(self, breaker: CircuitBreaker, failure_rate: float, seed: int) -> None:
        self.breaker = breaker
        self.failure_rate = failure_rate
        self.random = random.Random(seed)
        self.decisions: list[float] = []
        self.reports: list[float] = []
        self.refused = 0

    def decide(self) -> Permit | None:
        began = time.perf_counter()
        decision = self.breaker.acquire(time.monotonic())
        self.decisions.append(time.perf_counter() - began)
        if isinstance(decision, Permit):
            return decision
        self.refused += 1
        return None

    def report(self, permit: Permit | None) -> None:
        if permit:
            outcome = Outcome.ENGINE_FAILED if self.random.random() < self.failure_rate else Outcome.SUCCESS
            began = time.perf_counter()
            self.breaker.record(permit, outcome, time.monotonic())
            self.reports.append(time.perf_counter() - began)


def run_threads(callers: list[Caller], pause: float, seconds: float) -> None:
    barrier = threading.Barrier(len(callers))

    def work(caller: Caller) -> None:
        barrier.wait()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            permit = caller.decide()
            if pause:
                time.sleep(pause)
            caller.report(permit)

    threads = [threading.Thread(target=work, args=(caller,)) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run_tasks(callers: list[Caller], pause: float, seconds: float) -> None:
    async def work(caller: Caller, until: float) -> None:
        while time.monotonic() < until:
            permit = caller.decide()
            await asyncio.sleep(pause)
            caller.report(permit)

    async def main() -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(work(caller, until) for caller in callers))

    asyncio.run(main())


def decisions(count: int, pause: float, seconds: float) -> Table:
    table = Table(title=f"breaker among {count} concurrent callers, µs")
    for column in ("callers", "decisions", "refused", "opened", "p50", "p99", "max", "report p50", "report p99", "max"):
        table.add_column(column, justify="left" if column == "callers" else "right")
    for kind, run in (("threads", run_threads), ("tasks", run_tasks)):
        for wait in (pause, 0.0):
            breaker = CircuitBreaker(SETTINGS.breaker_config())
            callers = [Caller(breaker, FAILURE_RATE if wait else 0.0, seed) for seed in range(count)]
            run(callers, wait, seconds)
            decided = [1e6 * each for caller in callers for each in caller.decisions]
            reported = [1e6 * each for caller in callers for each in caller.reports]
            transitions = breaker.snapshot(time.monotonic()).transitions
            table.add_row(
                f"{kind}, {f'{1e3 * wait:g} ms' if wait else 'no pause'}",
                f"{len(decided):,}",
                f"{sum(caller.refused for caller in callers):,}",
                str(sum(number for (_, after), number in transitions.items() if after is State.OPEN)),
                *(
                    f"{value:,.{1 if value < 1000 else 0}f}"
                    for times in (decided, reported)
                    for value in (percentile(times, 50), percentile(times, 99), max(times))
                ),
            )
    return table


class Guarded:
    """A call as the failsafe makes it: deadline, budget, breaker, and another attempt after a failure."""

    def __init__(self, call: Callable[[], Outcome]) -> None:
        settings, now = ResilienceSettings(), time.monotonic()
        self.call = call
        self.breaker = CircuitBreaker(settings.breaker_config())
        self.budget = RetryBudget(settings.budget_config(), now)
        self.policy = settings.retry_policy()

    def __call__(self) -> Outcome:
        deadline = Deadline.after(30.0, time.monotonic())
        self.budget.deposit()
        for attempt in range(1, self.policy.max_attempts + 1):
            permit = self.breaker.acquire(time.monotonic())
            if not isinstance(permit, Permit):
                return Outcome.UNAVAILABLE
            outcome = self.call()
            now = time.monotonic()
            self.breaker.record(permit, outcome, now)
            if outcome.verdict is not Verdict.FAILURE:
                return outcome
            delay = self.policy.next_delay(attempt, now, deadline, random.random(), self.budget)
            if not isinstance(delay, float):
                break
            time.sleep(delay)
        return outcome


def per_second(call: Callable[[], Outcome], threads: int, seconds: float) -> float:
    counts = [0] * threads
    barrier = threading.Barrier(threads)

    def work(number: int) -> None:
        barrier.wait()
        until, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < until:
            call()
            count += 1
        counts[number] = count

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / seconds


def overhead(repetitions: int, seconds: float) -> Table:
    def nothing() -> Outcome:
        return Outcome.SUCCESS

    def work() -> Outcome:
        until = time.perf_counter() + 0.001
        while time.perf_counter() < until:
            pass
        return Outcome.SUCCESS

    def pause() -> Outcome:
        time.sleep(0.01)
        return Outcome.SUCCESS

    table = Table(title=f"calls a second without and with breaker and retries, medians of {repetitions}")
    for column in ("the call", "threads", "bare", "guarded", "µs more a call", "throughput lost"):
        table.add_column(column, justify="left" if column == "the call" else "right")
    for label, call, threads in (("nothing", nothing, 1), ("works 1 ms", work, 1), ("waits 10 ms", pause, 16)):
        guarded_call = Guarded(call)
        pairs = [
            (per_second(call, threads, seconds), per_second(guarded_call, threads, seconds)) for _ in range(repetitions)
        ]
        bare, guarded = (statistics.median(side) for side in zip(*pairs, strict=True))
        more = 1e6 * statistics.median(1 / with_it - 1 / without for without, with_it in pairs)
        lost = statistics.median(1 - with_it / without for without, with_it in pairs)
        table.add_row(
            label,
            str(threads),
            f"{bare:,.0f}",
            f"{guarded:,.0f}",
            f"{more:.1f}" if threads == 1 else "",
            f"{100 * lost:.2f} %" if call is not nothing else "",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=1000, help="concurrent callers")
    parser.add_argument("--pause-ms", type=float, default=100, help="how long a caller's call takes")
    parser.add_argument("--seconds", type=float, default=5, help="length of each measurement of decisions")
    parser.add_argument("--repetitions", type=int, default=5, help="pairs of measurements of the overhead")
    options = parser.parse_args()
    console = Console(width=120)
    console.print(decisions(options.callers, options.pause_ms / 1e3, options.seconds))
    console.print(overhead(options.repetitions, min(options.seconds, 2.0)))


if __name__ == "__main__":
    main()
