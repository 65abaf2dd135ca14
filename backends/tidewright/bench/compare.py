"""`tidewright bench`: runs the workloads on all systems in turns, and makes a report of what was measured."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rich.progress import Progress

from tidewright.bench.machine import wait_idle
from tidewright.bench.targets import EngineTarget, Target, TargetError
from tidewright.bench.workloads import ONE_BY_ONE, SHORT, Request, Run, Workload
from tidewright.engine.messages import STEP_PHASES, EngineStats
from tidewright.kv_cache.block_pool import BlockPool

OURS, ENGINE = "tidewright", "engine alone"
RUNNING = 16  # requests at once in W2


def ttft_ms(run: Run) -> float:
    return 1000 * statistics.mean(outcome.first for outcome in run.outcomes)


def decode_rate(run: Run) -> float:
    return 1 / run.outcomes[0].token_seconds


def throughput(run: Run) -> float:
    return run.tokens / run.seconds


# What is read off each workload: label, workload, figure of a run, whether more is better.
FIGURES: list[tuple[str, str, Callable[[Run], float], bool]] = [
    ("W1 TTFT, ms", "W1", ttft_ms, False),
    ("W1 decode, tokens/s", "W1", decode_rate, True),
    ("W2 throughput, tokens/s", "W2", throughput, True),
    ("W2 mean TTFT, ms", "W2", ttft_ms, False),
    ("W3 throughput, tokens/s", "W3", throughput, True),
    ("W3 mean TTFT, ms", "W3", ttft_ms, False),
    ("W4 time, ms", "W4", ttft_ms, False),
]


@dataclass
class Measured:
    """All runs by workload and system, and what was noticed on the way."""

    runs: dict[str, dict[str, list[Run]]] = field(default_factory=dict)
    engine: list[tuple[EngineStats, EngineStats]] = field(default_factory=list)
    """The engine's counters before and after each W2."""
    disturbed: int = 0
    """Runs that began although the cores were not idle."""

    def __getitem__(self, workload: str) -> dict[str, list[Run]]:
        return self.runs.setdefault(workload, {})


def measure(
    targets: Sequence[Target],
    repetitions: int,
    ids: Sequence[int],
    progress: Progress,
    workloads: dict[str, Workload],
) -> Measured:
    """Runs each workload `repetitions` times on each target, after once for warming up.

    In each repetition the systems take turns, so that a slow moment of the machine meets all of them.

    Raises:
        TargetError: a request failed.
    """
    measured = Measured()
    turns = sum(len(_takers(workload, targets)) for workload in workloads.values())
    bar = progress.add_task("Measuring", total=(repetitions + 1) * turns)
    for repetition in range(repetitions + 1):
        if not progress.console.is_terminal:  # where no bar is drawn
            progress.console.print(f"Repetition {repetition} of {repetitions}" + " (warm-up)" * (repetition == 0))
        for name, workload in workloads.items():
            takers = _takers(workload, targets)
            turn = repetition % len(takers)  # rotated, so that none always runs right after the same other one
            for target in takers[turn:] + takers[:turn]:
                progress.update(bar, description=f"{repetition}/{repetitions} {name} {target.name}")
                requests = workload.requests(random.Random(f"{repetition} {name}"), ids)
                idle = wait_idle()
                if isinstance(target, EngineTarget) and name == "W2" and repetition:
                    before = target.stats()
                    run = _run(target, requests, workload)
                    measured.engine.append((before, target.stats()))
                else:
                    run = _run(target, requests, workload)
                progress.advance(bar)
                if repetition:  # the first is for warming up
                    measured.disturbed += not idle
                    measured[name].setdefault(target.name, []).append(run)
    return measured


def _takers(workload: Workload, targets: Sequence[Target]) -> list[Target]:
    if not workload.one_by_one:
        return list(targets)
    return [t for t in targets if t.name == OURS or (t.name == ENGINE and workload.engine_too)]


def _run(target: Target, requests: Sequence[Request], workload: Workload) -> Run:
    if workload.one_by_one:
        outcomes = [target.run([request])[0] for request in requests]
        run = Run(outcomes, sum(outcome.last for outcome in outcomes))
    else:
        run = Run.of(requests, target.run(requests))
    if errors := [outcome.error for outcome in run.outcomes if outcome.error]:
        raise TargetError(f"{target.name} failed a request: {errors[0]}")
    return run


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(measured: Measured) -> dict:
    """Figures of all systems with their spread, and what ours can say about itself."""
    made: dict = {
        "runs begun on busy cores": measured.disturbed,
        "figures": {
            label: {name: spread(map(figure, runs)) for name, runs in measured[workload].items()}
            for label, workload, figure, _ in FIGURES
        },
    }
    if measured[ONE_BY_ONE]:
        made["continuous batching"] = _batching(measured["W2"][OURS], measured[ONE_BY_ONE][OURS])
    if ENGINE in measured["W1"]:
        made["overhead of Triton and bridge"] = _overhead(measured)
        made["engine"] = _engine(measured)
    return made


def _median(figure: Callable[[Run], float], runs: Iterable[Run]) -> float:
    return statistics.median(map(figure, runs))


def _batching(at_once: list[Run], one_by_one: list[Run]) -> dict[str, float]:
    def latency(run: Run) -> float:
        return statistics.mean(outcome.last for outcome in run.outcomes)

    together, alone = _median(throughput, at_once), _median(throughput, one_by_one)
    return {
        "16 at once, tokens/s": together,
        "one by one, tokens/s": alone,
        "throughput ratio": together / alone,
        "latency of a request, at once / alone": _median(latency, at_once) / _median(latency, one_by_one),
    }


def _overhead(measured: Measured) -> dict[str, float]:
    ours, engine = measured["W1"][OURS], measured["W1"][ENGINE]

    def token_ms(run: Run) -> float:
        return 1000 * run.outcomes[0].token_seconds

    def tokens_a_response(run: Run) -> float:
        return run.tokens / sum(outcome.responses for outcome in run.outcomes)

    return {
        "a request (TTFT of short ones), ms": _first_ms(measured[SHORT][OURS]) - _first_ms(measured[SHORT][ENGINE]),
        "a token (W1), ms": _median(token_ms, ours) - _median(token_ms, engine),
        "tokens a response (W2)": _median(tokens_a_response, measured["W2"][OURS]),
    }


def _first_ms(runs: Iterable[Run]) -> float:
    return 1000 * statistics.median(outcome.first for run in runs for outcome in run.outcomes)


def _engine(measured: Measured) -> dict[str, float]:
    """Shares of the step time with 16 requests running, by the engine's own clocks and by a measurement of the pool."""
    shares = step_shares(measured.engine)
    step = statistics.median(outcome.token_seconds for run in measured["W2"][ENGINE] for outcome in run.outcomes)
    shares["one block for each request, % of a step"] = 100 * RUNNING * block_seconds() / step
    return shares


def step_shares(counters: Sequence[tuple[EngineStats, EngineStats]]) -> dict[str, float]:
    """What part of the engine's time went where, from its counters before and after each run; {} if it keeps none."""
    seconds = {
        part: sum(getattr(after, f"{part}_seconds") - getattr(before, f"{part}_seconds") for before, after in counters)
        for part in STEP_PHASES
    }
    total = sum(seconds.values())
    return {f"{part}, % of step time": 100 * seconds[part] / total for part in STEP_PHASES} if total else {}


def block_seconds(rounds: int = 2000) -> float:
    """Seconds that it takes to allocate a block and give it back, in a pool of the usual size."""
    pool = BlockPool(4096)
    began = time.perf_counter()
    for _ in range(rounds):
        pool.free(pool.allocate(1)[0])
    return (time.perf_counter() - began) / rounds
