"""What the bridge counts and times, in plain Python; `metrics.py` makes samples of it for Triton's /metrics.

A metric call of Triton costs 15 to 90 µs and takes one value, which is too much for each token.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass, field

import msgspec

from tidewright.engine.messages import STEP_PHASES, EngineStats
from tidewright.memory.reclaim import STAGES
from tidewright.schema import FINISH_REASONS, FinishReason

# Upper bounds of the histograms' buckets, in seconds.
REQUEST_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0),
)
TOKEN_BUCKETS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)

_NO_STATS = EngineStats(0, 0, 0, 0, 0, 0, 0, 0)
# Fields of EngineStats that count from the engine's start; the others are gauges.
_COUNTERS = (
    *("steps", "prompt_tokens", "generated_tokens", "preemptions"),
    *("prefix_queries", "prefix_hits", "prefix_evictions", "tokens_drafted", "tokens_accepted"),
    *("steps_out_of_memory", "refused_by_timeout", "refused_by_target", "cache_resizes"),
    *(f"{phase}_seconds" for phase in STEP_PHASES),
)


class CumulativeStats:
    """The stats of all engines so far: a new engine counts from zero, the counters here go on.

    One thread writes; any may read.
    """

    def __init__(self) -> None:
        self._state = (_NO_STATS, _NO_STATS)  # sums of past engines, and what the running one last said

    def update(self, stats: EngineStats) -> None:
        self._state = (self._state[0], stats)

    def engine_lost(self) -> None:
        """Its counters are kept, its gauges are zero from now on."""
        self._state = (_sum(*self._state), _NO_STATS)

    def read(self) -> EngineStats:
        return _sum(*self._state)


def _sum(past: EngineStats, latest: EngineStats) -> EngineStats:
    counters = {name: getattr(past, name) + getattr(latest, name) for name in _COUNTERS}
    reclaimed = {stage: past.reclaimed.get(stage, 0) + latest.reclaimed.get(stage, 0) for stage in STAGES}
    return msgspec.structs.replace(latest, **counters, reclaimed=reclaimed)


@dataclass
class Histogram:
    """Counts of values by bucket; a value belongs to the first bound that is not below it, or to none."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def copy(self) -> Histogram:
        made = Histogram(self.bounds, self.total)
        made.counts = self.counts.copy()
        return made


# Which latency targets a request met.
TARGETS = ("ttft", "tpot", "both")


class RequestStats:
    """How requests ended and how long they took. Any thread may write and read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._finished: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)
        self._within = dict.fromkeys(TARGETS, 0)
        self._queued = Histogram(REQUEST_BUCKETS)
        self._first_token = Histogram(REQUEST_BUCKETS)
        self._inter_token = Histogram(TOKEN_BUCKETS)
        self._whole = Histogram(REQUEST_BUCKETS)

    def first_token(self, queued: float, since_arrival: float) -> None:
        """A request's first tokens are out; both in seconds."""
        with self._lock:
            self._queued.observe(queued)
            self._first_token.observe(since_arrival)

    def further_tokens(self, apart: float, count: int) -> None:
        """So many tokens of a sequence came after others, each so many seconds after the one before."""
        with self._lock:
            self._inter_token.observe(apart, count)

    def finished(self, reason: FinishReason, since_arrival: float | None = None) -> None:
        """A request ended; with the seconds that it took if it got an answer and not an error."""
        with self._lock:
            self._finished[reason] += 1
            if since_arrival is not None:
                self._whole.observe(since_arrival)

    def within(self, ttft: bool, tpot: bool) -> None:
        """A request ended with its whole answer, and met these targets."""
        with self._lock:
            self._within["ttft"] += ttft
            self._within["tpot"] += tpot
            self._within["both"] += ttft and tpot

    def read_within(self) -> dict[str, int]:
        with self._lock:
            return self._within.copy()

    def read_finished(self) -> dict[str, int]:
        with self._lock:
            return self._finished.copy()

    def read_histograms(self) -> dict[str, Histogram]:
        """By the name of the metric."""
        with self._lock:
            return {
                "request_queue_seconds": self._queued.copy(),
                "time_to_first_token_seconds": self._first_token.copy(),
                "inter_token_latency_seconds": self._inter_token.copy(),
                "request_latency_seconds": self._whole.copy(),
            }
