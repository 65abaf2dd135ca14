"""A day of synthetic series of every metric in the catalogue, as OpenMetrics text."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tidewright.metrics import Label, MetricSpec
from tidewright_gateway.metrics.catalogue import CATALOGUE, GATEWAY_PREFIX

GATEWAY = {"job": "gateway", "instance": "gateway:8080"}
TRITONS = [{"job": "triton", "instance": f"replica-{number}:8002"} for number in range(3)]
OPEN = {
    "path": ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages"),
    "key_id": ("team-search", "team-chat", "batch", "free", "_other"),
    "replica": ("replica-0:8001", "replica-1:8001", "replica-2:8001"),
    "status": ("200",),
    "code": ("",),
    "version": ("1",),
    "model": ("decoder", "failsafe", "tokenizer", "generate"),
    "reason": ("OTHER", "REJECTED"),
}
"""Values of labels that the catalogue leaves open."""
REFUSED = [("429", "rate_limit_exceeded", 0.02), ("400", "invalid_value", 0.01), ("503", "overloaded", 0.003)]
OUTCOMES = {"ok": 3.0, "client_error": 0.05, "limited": 0.05, "disconnected": 0.02}
SIZES = {"batch_places": 64, "queue_places": 64, "kv_blocks": 4096, "max_fds": 1048576, "replicas_usable": 3}
RARE = ("failed", "overloaded", "fail", "refus", "preempt", "restart", "lost", "dropped", "transition", "moved", "retr")
Line = Callable[[str, dict[str, str], np.ndarray], None]


def write_openmetrics(file: Path, start: int, end: int, scrape: int) -> int:
    """Returns the number of series. A day has its rhythm: the most load in the afternoon."""
    times = np.arange(start, end, scrape)
    day = 0.55 + 0.45 * np.sin(2 * np.pi * (times / 86400 - 0.35))
    chance = np.random.default_rng(7)
    random.seed(7)
    count = 0
    with open(file, "w") as out:
        for prefix, specs in CATALOGUE.items():
            places = [GATEWAY] if prefix in (GATEWAY_PREFIX, "process_") else TRITONS
            for spec in specs:
                name = prefix + spec.name
                out.write(f"# TYPE {name} unknown\n")
                for suffix, labels, values in series(spec, times, day * scrape, chance):
                    for place in places:
                        count += 1
                        shown = ",".join(f'{key}="{value}"' for key, value in {**place, **labels}.items())
                        head = f"{name}{suffix}{{{shown}}} "
                        out.writelines(f"{head}{value:.12g} {at}\n" for at, value in zip(times, values, strict=True))
        out.write("# EOF\n")
    return count


def series(
    spec: MetricSpec, times: np.ndarray, work: np.ndarray, chance: np.random.Generator
) -> Iterator[tuple[str, dict[str, str], np.ndarray]]:
    """Suffix of the name, labels, values. `work`: how much there was to do in each interval."""
    for labels, weight in combinations(spec):
        noise = chance.lognormal(0, 0.3, len(times))
        if spec.kind == "counter":
            yield "", labels, np.cumsum(work * noise * weight).round(3)
        elif spec.kind == "gauge":
            yield "", labels, gauge(spec, labels, times, work / work.max(), noise)
        else:
            total = np.cumsum(work * noise * weight).round()
            middle = len(spec.buckets) // 3
            for place, bound in enumerate((*spec.buckets, math.inf)):
                share = 1.0 if math.isinf(bound) else 1 / (1 + math.exp(-2 * (place - middle)))
                yield (
                    "_bucket",
                    {**labels, "le": "+Inf" if math.isinf(bound) else f"{bound:g}"},
                    (total * share).round(),
                )
            yield "_sum", labels, total * spec.buckets[middle]
            yield "_count", labels, total


def combinations(spec: MetricSpec) -> Iterator[tuple[dict[str, str], float]]:
    """Labels of each series, and how much it counts."""
    if spec.name == "requests_total":
        for path in OPEN["path"]:
            yield {"path": path, "status": "200", "code": ""}, 1.0
            yield from (({"path": path, "status": status, "code": code}, weight) for status, code, weight in REFUSED)
        return
    for values in itertools.product(*(label.values or OPEN[label.name] for label in spec.labels)):
        labels = {label.name: value for label, value in zip(spec.labels, values, strict=True)}
        if "outcome" in labels and "ok" in spec.labels[-1].values:
            yield labels, OUTCOMES.get(labels["outcome"], 0.001)
            continue
        is_rare = any(word in f"{spec.name} {' '.join(values)}" for word in RARE)
        yield labels, (0.001 if is_rare else 1.0) * random.lognormvariate(0, 0.8)


def gauge(
    spec: MetricSpec, labels: dict[str, str], times: np.ndarray, load: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    if spec.name == "heartbeat_timestamp_seconds":
        return times.astype(float)
    if spec.name.endswith("timestamp_seconds"):
        return np.full(len(times), times[-1] + 40 * 86400.0 if "expiry" in spec.name else 0.0)
    if spec.name in ("info", "engine_up", "healthy", "replica_up") or labels.get("state") == "closed":
        return np.ones(len(times))
    if any(_is_state(label) for label in spec.labels) or spec.name in ("replica_load_stale", "degradation_level"):
        return np.zeros(len(times))
    if spec.name.endswith(("_ratio", "_utilization")):
        return np.clip(0.8 * load * noise, 0, 1)
    if spec.name.endswith("bytes"):
        return (2**30 * (0.5 + 0.3 * load)).round()
    if spec.name in ("batch_places", "queue_places", "kv_blocks", "max_fds", "replicas_usable"):
        return np.full(
            len(times), {"kv_blocks": 4096.0, "max_fds": 1048576.0, "replicas_usable": 3.0}.get(spec.name, 64.0)
        )
    if spec.name in ("queue_length", "requests_waiting"):
        return np.where(load > 0.9, (5 * load * noise).round(), 0.0)
    return (40 * load * noise).round()


def _is_state(label: Label) -> bool:
    return label.name in ("state", "signal", "store")
