"""`tidewright bench sweep`: requests arrive by chance at a given rate, as users do; how long do they wait?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.progress import Progress

from tidewright.bench.machine import wait_idle
from tidewright.bench.targets import Target, TargetError
from tidewright.bench.workloads import Outcome, Request, Run, poisson_requests

PERCENTILES = (50, 90, 99)
LATENCIES = ("TTFT, ms", "TPOT, ms", "end to end, ms")
LOADS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)  # of our capacity, where no rates are given
BURST = 32  # requests at once that measure the capacity


@dataclass(frozen=True)
class Goal:
    """What counts as served well."""

    ttft: float  # seconds
    tpot: float  # seconds

    def met(self, outcome: Outcome) -> bool:
        return not outcome.error and outcome.first <= self.ttft and outcome.token_seconds <= self.tpot


def sweep(
    targets: Sequence[Target],
    mix: list[tuple[int, int]],
    rates: Sequence[float],
    count: int,
    seed: int,
    ids: Sequence[int],
    goal: Goal,
    progress: Progress,
) -> dict:
    """Measures each target at each rate with `count` requests; without rates, at parts of the first one's capacity.

    Raises:
        TargetError: a system failed before it was under load.
    """
    bar = progress.add_task("Measuring", total=len(targets) * (1 + len(rates or LOADS)))
    capacities = {}
    for target in targets:
        progress.update(bar, description=f"capacity of {target.name}")
        wait_idle()
        burst = poisson_requests(mix, 1.0, min(count, BURST), seed, ids, "capacity")
        capacities[target.name] = _capacity(target, burst)
        progress.advance(bar)
    rates = rates or [round(load * capacities[targets[0].name], 3) for load in LOADS]
    points = []
    for rate in rates:
        if not progress.console.is_terminal:  # where no bar is drawn
            progress.console.print(f"{rate:g} requests/s")
        for target in targets:
            progress.update(bar, description=f"{rate:g} requests/s on {target.name}")
            wait_idle()
            requests = poisson_requests(mix, rate, count, seed, ids)
            points.append({"system": target.name, "rate": rate, **summary(requests, target.run(requests), goal)})
            progress.advance(bar)
    return {"capacity, requests/s": capacities, "points": points}


def _capacity(target: Target, requests: Sequence[Request]) -> float:
    """Requests a second when they come all at once."""
    burst = [Request(request.prompt, request.max_tokens) for request in requests]
    run = Run.of(burst, target.run(burst))
    if errors := [outcome.error for outcome in run.outcomes if outcome.error]:
        raise TargetError(f"{target.name} failed a request: {errors[0]}")
    return len(burst) / run.seconds


def summary(requests: Sequence[Request], outcomes: Sequence[Outcome], goal: Goal) -> dict:
    """Percentiles in ms over the requests that were served, and rates over the whole run."""
    run = Run.of(requests, outcomes)
    served = [outcome for outcome in outcomes if not outcome.error]
    times = (
        [outcome.first for outcome in served],
        [outcome.token_seconds for outcome in served if outcome.tokens > 1],
        [outcome.last for outcome in served],
    )
    seconds = run.seconds or float("inf")
    return {
        **{
            name: {f"p{p}": 1000 * percentile(values, p) for p in PERCENTILES}
            for name, values in zip(LATENCIES, times, strict=True)
        },
        "achieved, requests/s": len(served) / seconds,
        "tokens/s": run.tokens / seconds,
        "goodput, requests/s": sum(map(goal.met, outcomes)) / seconds,
        "errors": len(outcomes) - len(served),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest values; not a number where there are none."""
    if not values:
        return float("nan")
    ranked = sorted(values)
    place = (len(ranked) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (ranked[above] - ranked[below]) * (place - below)
