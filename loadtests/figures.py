"""From samples to the report's figures; all of them are plain numbers, as they stand in the JSON file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from loadtests.options import Options
from loadtests.samples import Sample
from loadtests.shapes import SHAPES, is_peak, users_at

VERSION = 1
"""Of the JSON file."""
PERCENTILES = (50, 90, 95, 99)
LATENCIES: Mapping[str, Callable[[Sample], float]] = {
    "ttft": lambda sample: sample.first,
    "tpot": lambda sample: sample.per_token,
    "e2e": lambda sample: sample.last,
    "longest_gap": lambda sample: sample.longest_gap,
}
CDF_POINTS = 101
WINDOWS = 60  # at most, over the whole run
MAX_ERRORS = 50  # kinds that are listed
PLATEAU = 0.75
"""Of what the first step promises: with less throughput than that, more users only wait."""


def seconds_of(samples: Sequence[Sample], name: str) -> np.ndarray:
    """Of the requests that were served; TPOT needs two tokens."""
    served = (one for one in samples if one.served and (one.output_tokens > 1 or name not in ("tpot", "longest_gap")))
    return np.array([LATENCIES[name](one) for one in served])


def summary(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """Of all requests, or those of one tenant, protocol or window. Latencies are in milliseconds."""
    served = [one for one in samples if one.served]
    failed = sum(bool(one.error) for one in samples)
    found: dict[str, Any] = {
        "requests": len(samples),
        "served": len(served),
        "failed": failed,
        "cancelled": sum(one.cancelled for one in samples),
        "error_rate": failed / len(samples) if samples else 0.0,
        "requests_per_second": len(served) / seconds if seconds else 0.0,
        "tokens_per_second": sum(one.output_tokens for one in served) / seconds if seconds else 0.0,
        "prompt_tokens": sum(one.prompt_tokens for one in served),
        "output_tokens": sum(one.output_tokens for one in served),
    }
    for name in LATENCIES:
        found[f"{name}_ms"] = _latency(seconds_of(samples, name))
    return found


def _latency(seconds: np.ndarray) -> dict[str, float | None]:
    if not len(seconds):
        return dict.fromkeys(("mean", *(f"p{p}" for p in PERCENTILES), "max"))
    values = [float(np.mean(seconds)), *map(float, np.percentile(seconds, PERCENTILES)), float(np.max(seconds))]
    return {
        name: round(1000 * value, 3)
        for name, value in zip(("mean", *(f"p{p}" for p in PERCENTILES), "max"), values, strict=True)
    }


def cdf(samples: Sequence[Sample], name: str) -> list[float]:
    """Percentiles 0 to 100, in milliseconds; empty if nothing was served."""
    seconds = seconds_of(samples, name)
    if not len(seconds):
        return []
    return [round(1000 * float(value), 3) for value in np.percentile(seconds, np.linspace(0, 100, CDF_POINTS))]


def windows(samples: Sequence[Sample], options: Options, began: float, seconds: float) -> list[dict[str, Any]]:
    """The run in equal parts. A request counts where it ended."""
    width = max(1.0, seconds / WINDOWS)
    parts: list[list[Sample]] = [[] for _ in range(max(1, math.ceil(seconds / width)))]
    for one in samples:
        place = int((one.at + one.last - began) / width)
        parts[min(max(place, 0), len(parts) - 1)].append(one)
    found = []
    for number, part in enumerate(parts):
        middle = (number + 0.5) * width
        users = users_at(options.shape, middle, options.duration, options.users)
        found.append({"at": round(middle, 3), "users": users, **summary(part, width)})
    return found


def steps(samples: Sequence[Sample], options: Options, began: float, seconds: float) -> list[dict[str, Any]]:
    """What each number of users got, over all the time that there were so many."""
    slices = 480
    width = min(seconds, options.duration) / slices
    at_users: Counter[int] = Counter()
    for number in range(slices):
        at_users[users_at(options.shape, (number + 0.5) * width, options.duration, options.users)] += 1
    parts: dict[int, list[Sample]] = {users: [] for users in at_users}
    for one in samples:
        users = users_at(options.shape, one.at + one.last - began, options.duration, options.users)
        if users in parts:  # not that of a step that had just begun
            parts[users].append(one)
    return [{"users": users, **summary(part, at_users[users] * width)} for users, part in sorted(parts.items())]


def knee(points: Sequence[Mapping[str, Any]], think: float = 0.0) -> dict[str, Any]:
    """Where more users get no more throughput, by the two asymptotes of a closed system.

    With few users each gets 1 / (R + Z) requests a second (R: latency, Z: think time); with many, all of them together
    get at most X. The lines meet at N* = X (R + Z) users. `reached`: the most users got clearly less than the first
    line.
    """
    points = [point for point in points if point["e2e_ms"]["mean"] and point["requests_per_second"]]
    if len(points) < 3:
        return {"reached": False, "why": "it takes at least three numbers of users: use --shape ramp"}
    first, last = points[0], points[-1]
    cycle = first["e2e_ms"]["mean"] / 1000 + think
    most = max(point["requests_per_second"] for point in points)
    alone = first["requests_per_second"] / first["users"]
    return {
        "reached": last["requests_per_second"] < PLATEAU * alone * last["users"],
        "users": round(most * cycle, 2),
        "requests_per_second": round(most, 4),
        "latency_alone_ms": round(1000 * (cycle - think), 3),
    }


def errors(samples: Sequence[Sample]) -> dict[str, int]:
    return dict(Counter(one.error for one in samples if one.error).most_common(MAX_ERRORS))


def peak(samples: Sequence[Sample], options: Options, began: float) -> dict[str, Any] | None:
    """Before, in and after the middle third, where the load of some shapes comes: did others notice?"""
    if options.shape not in ("spike", "multi-tenant"):
        return None
    parts: dict[str, list[Sample]] = {"before": [], "peak": [], "after": []}
    for one in samples:
        passed = (one.at - began) / options.duration
        parts["peak" if is_peak(passed) else "before" if passed < 0.5 else "after"].append(one)
    third = options.duration / 3
    return {
        tenant: {part: summary([one for one in those if one.tenant == tenant], third) for part, those in parts.items()}
        for tenant in options.tenants
    }


def report(samples: Sequence[Sample], options: Options, began: float, ended: float, **more: Any) -> dict[str, Any]:
    """All of it. `began` and `ended` are seconds since the epoch; `more` is what is known beside the samples."""
    seconds = max(ended - began, 1e-9)
    groups = {
        group: {
            value: summary([one for one in samples if getattr(one, group) == value], seconds) for value in sorted(there)
        }
        for group in ("protocol", "kind", "tenant")
        if (there := {getattr(one, group) for one in samples})
    }
    by_users = steps(samples, options, began, seconds)
    return {
        "version": VERSION,
        "began": began,
        "seconds": round(seconds, 3),
        "options": options.shown(),
        "shape": SHAPES[options.shape].about,
        "summary": summary(samples, seconds),
        "groups": groups,
        "windows": windows(samples, options, began, seconds),
        "steps": by_users,
        "knee": knee(by_users, options.think),
        "peak": peak(samples, options, began),
        "cdf_ms": {name: cdf(samples, name) for name in LATENCIES},
        "errors": errors(samples),
        **more,
    }
