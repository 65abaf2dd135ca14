"""Engine and bridge figures in Triton's own /metrics, refreshed on a timer: a metric call costs up to 90 µs.

Histograms are made of counters, one a bucket: Triton's own kind takes one value a call, and we have one a token.
Prometheus stores the same series either way.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tidewright.bridge.bridge import Bridge
from tidewright.bridge.statistics import REQUEST_BUCKETS, TOKEN_BUCKETS, Histogram
from tidewright.engine.messages import STEP_PHASES
from tidewright.schema import FINISH_REASONS

REFRESH_INTERVAL = 0.25  # seconds
PREFIX, FALLBACK_PREFIX = "tidewright_", "tidewright_fallback_"


@dataclass(frozen=True)
class MetricSpec:
    """A metric as docs/metrics.md lists it; with a label there is one series for each of `values`."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    label: str = ""
    values: tuple[str, ...] = ("",)


def _histogram(name: str, bounds: tuple[float, ...], meaning: str) -> MetricSpec:
    return MetricSpec(name, "histogram", meaning, "le", (*(f"{bound:g}" for bound in bounds), "+Inf"))


METRICS = (
    MetricSpec("engine_up", "gauge", "1 while an engine process takes requests"),
    MetricSpec("engine_restarts_total", "counter", "Times that the engine process was started again"),
    MetricSpec("requests_active", "gauge", "Requests in flight in the bridge"),
    MetricSpec("requests_running", "gauge", "Sequences in the engine's current batch"),
    MetricSpec("requests_waiting", "gauge", "Sequences waiting for a place in the batch"),
    MetricSpec(
        "requests_finished_total",
        "counter",
        "Requests that ended, each counted once; with n > 1 as timeout if one sequence timed out, else as length if "
        "one ended so, else as stop",
        "reason",
        FINISH_REASONS,
    ),
    _histogram(
        "request_queue_seconds",
        REQUEST_BUCKETS,
        "From the engine's receipt of a request to its first step; counted with the first token",
    ),
    _histogram(
        "time_to_first_token_seconds",
        REQUEST_BUCKETS,
        "From arrival to the first token's response, or to when it could have left if the request does not stream",
    ),
    _histogram(
        "inter_token_latency_seconds",
        TOKEN_BUCKETS,
        "Between two tokens of a sequence; tokens that leave in one response share the time since the last one",
    ),
    _histogram(
        "request_latency_seconds",
        REQUEST_BUCKETS,
        "From arrival to the last response, of requests that ended with an answer and not an error",
    ),
    MetricSpec("engine_steps_total", "counter", "Steps of the engine"),
    MetricSpec(
        "step_seconds_total",
        "counter",
        "Time of the engine by part of the step; send has its own thread and overlaps the others",
        "phase",
        STEP_PHASES,
    ),
    MetricSpec("prompt_tokens_total", "counter", "Prompt tokens of requests that got their first token"),
    MetricSpec("generated_tokens_total", "counter", "Tokens generated"),
    MetricSpec("preemptions_total", "counter", "Sequences pushed out of the batch for lack of KV blocks"),
    MetricSpec("kv_blocks_total", "gauge", "Blocks of the KV cache"),
    MetricSpec("kv_blocks_free", "gauge", "Blocks of the KV cache that no request uses"),
    MetricSpec("kv_blocks_cached", "gauge", "Free blocks whose content the prefix cache can still find"),
    MetricSpec("kv_usage_ratio", "gauge", "Share of the KV cache's blocks that requests use, 0 to 1"),
    MetricSpec("kv_slots_unused", "gauge", "Fragmentation: token slots of used blocks that hold no token"),
    MetricSpec("prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache"),
    MetricSpec("prefix_cache_hits_total", "counter", "Prompt tokens that the prefix cache had"),
    MetricSpec("prefix_cache_evictions_total", "counter", "Cached blocks given away for other content"),
    MetricSpec("speculative_tokens_drafted_total", "counter", "Tokens guessed by speculative decoding"),
    MetricSpec("speculative_tokens_accepted_total", "counter", "Guessed tokens that were right"),
)


def figures(bridge: Bridge) -> Iterator[tuple[str, str, float]]:
    """All series as they are now: name without prefix, value of its label or "", value."""
    stats = bridge.engine_stats
    used = stats.blocks_total - stats.blocks_free
    single: dict[str, float] = {
        "engine_up": int(bridge.engine_up),
        "engine_restarts_total": bridge.engine_restarts,
        "requests_active": bridge.active,
        "requests_running": stats.running,
        "requests_waiting": stats.waiting,
        "engine_steps_total": stats.steps,
        "prompt_tokens_total": stats.prompt_tokens,
        "generated_tokens_total": stats.generated_tokens,
        "preemptions_total": stats.preemptions,
        "kv_blocks_total": stats.blocks_total,
        "kv_blocks_free": stats.blocks_free,
        "kv_blocks_cached": stats.blocks_cached,
        "kv_usage_ratio": used / stats.blocks_total if stats.blocks_total else 0.0,
        "kv_slots_unused": stats.slots_unused,
        "prefix_cache_queries_total": stats.prefix_queries,
        "prefix_cache_hits_total": stats.prefix_hits,
        "prefix_cache_evictions_total": stats.prefix_evictions,
        "speculative_tokens_drafted_total": stats.tokens_drafted,
        "speculative_tokens_accepted_total": stats.tokens_accepted,
    }
    for name, value in single.items():
        yield name, "", value
    for reason, count in bridge.statistics.read_finished().items():
        yield "requests_finished_total", reason, count
    for phase in STEP_PHASES:
        yield "step_seconds_total", phase, getattr(stats, f"{phase}_seconds")
    for name, histogram in bridge.statistics.read_histograms().items():
        yield from _series(name, histogram)


def _series(name: str, histogram: Histogram) -> Iterator[tuple[str, str, float]]:
    """From the widest bucket down: a scrape between two of our calls still finds none above a wider one."""
    cumulative = list(itertools.accumulate(histogram.counts))
    yield f"{name}_count", "", cumulative[-1]
    yield f"{name}_sum", "", histogram.total
    yield f"{name}_bucket", "+Inf", cumulative[-1]
    for bound, count in reversed(list(zip(histogram.bounds, cumulative, strict=False))):
        yield f"{name}_bucket", f"{bound:g}", count


class BridgeMetrics:
    """A thread that copies figures into Triton's metrics; `family` is pb_utils.MetricFamily."""

    def __init__(self, bridge: Bridge, family: Any, prefix: str = PREFIX) -> None:
        self._bridge, self._prefix = bridge, prefix
        self._family = family
        self._families: list[Any] = []  # a metric dies with its family
        self._gauges: set[str] = set()
        self._metrics: dict[tuple[str, str], Any] = {}
        for spec in METRICS:
            if spec.kind == "histogram":
                self._make(f"{spec.name}_bucket", family.COUNTER, spec, spec.values)
                self._make(f"{spec.name}_sum", family.COUNTER, spec)
                self._make(f"{spec.name}_count", family.COUNTER, spec)
            elif spec.kind == "gauge":
                self._make(spec.name, family.GAUGE, spec)
                self._gauges.add(spec.name)
            else:
                self._make(spec.name, family.COUNTER, spec, spec.values)
        self._last = dict.fromkeys(self._metrics, 0.0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._metrics.clear()
        self._families.clear()

    def refresh(self) -> None:
        """Bring Triton's figures up to date; only what has changed costs a call."""
        for name, value_of_label, figure in figures(self._bridge):
            key = name, value_of_label
            change = figure - self._last[key]
            if not change:
                continue
            self._last[key] = figure
            if name in self._gauges:
                self._metrics[key].set(figure)
            else:
                self._metrics[key].increment(change)

    def _make(self, name: str, kind: Any, spec: MetricSpec, values: tuple[str, ...] = ("",)) -> None:
        made = self._family(name=f"{self._prefix}{name}", description=spec.meaning, kind=kind)
        self._families.append(made)
        for value in values:
            self._metrics[name, value] = made.Metric(labels={spec.label: value} if value else {})

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self.refresh()
            self._stopping.wait(REFRESH_INTERVAL)
