"""The metrics of `failsafe`, what it counts for them, and their samples for Triton's /metrics."""

from __future__ import annotations

import threading
from collections import Counter

from tidewright.metrics import HEARTBEAT, PREFIX, Label, MetricSpec, Samples, heartbeat
from tidewright.resilience.breaker import TRANSITIONS, BreakerSnapshot, State
from tidewright.resilience.degradation import Level
from tidewright.resilience.outcome import Outcome, Verdict
from tidewright.resilience.retry import NoRetry
from tidewright.schema import FINISH_REASONS

FAILSAFE_PREFIX = f"{PREFIX}failsafe_"
BREAKER_OPEN, DEGRADED = "breaker_open", "degraded"
FALLBACK_REASONS = (
    *(outcome.label for outcome in Outcome if outcome.verdict is Verdict.FAILURE),
    *(Outcome.ENGINE_KILLED.label, Outcome.OVERLOADED.label, BREAKER_OPEN, DEGRADED),
)
SERVED_BY = ("decoder", "fallback")
_STATES = tuple(state.value for state in State)
_TRANSITIONS = {pair: f"{pair[0].value}_{pair[1].value}" for pair in TRANSITIONS}

METRICS = (
    HEARTBEAT,
    MetricSpec("requests_active", "gauge", "Requests in flight in failsafe"),
    MetricSpec(
        "requests_served_total", "counter", "Requests that got their last response, by model", (Label("by", SERVED_BY),)
    ),
    MetricSpec(
        "requests_failed_total", "counter", "Requests that ended with an error", (Label("reason", FINISH_REASONS),)
    ),
    MetricSpec("calls_total", "counter", "Attempts, by the model that was called", (Label("model", SERVED_BY),)),
    MetricSpec(
        "outcomes_total",
        "counter",
        "How attempts at the decoder ended; what the breaker sees",
        (Label("outcome", tuple(outcome.label for outcome in Outcome)),),
    ),
    MetricSpec(
        "fallbacks_total",
        "counter",
        "Requests that went to the fallback, by the cause",
        (Label("reason", FALLBACK_REASONS),),
    ),
    MetricSpec("resumed_total", "counter", "Attempts that went on behind tokens that their caller had already"),
    MetricSpec("breaker_state", "gauge", "1 for the state that the breaker is in", (Label("state", _STATES),)),
    MetricSpec(
        "breaker_transitions_total", "counter", "Changes of the state", (Label("change", tuple(_TRANSITIONS.values())),)
    ),
    MetricSpec("retries_total", "counter", "Times that the decoder was asked again"),
    MetricSpec(
        "retries_refused_total",
        "counter",
        "Times that it was not asked again, by what forbade it",
        (Label("cause", tuple(cause.value for cause in NoRetry)),),
    ),
    MetricSpec("retry_budget", "gauge", "Retries that may be made now"),
    MetricSpec(
        "degradation_level", "gauge", f"Of the ladder: {', '.join(f'{level.value} {level.name}' for level in Level)}"
    ),
)
_COUNTERS = {spec.name: spec for spec in METRICS if spec.name not in ("retry_budget", "degradation_level")}


class Counters:
    """Any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def count(self, name: str, value_of_label: str = "") -> None:
        assert value_of_label in _COUNTERS[name].label_values
        with self._lock:
            self._counts[name, value_of_label] += 1

    def read(self) -> dict[tuple[str, str], int]:
        with self._lock:
            return dict(self._counts)


def samples(counters: Counters, active: int, breaker: BreakerSnapshot, retry_budget: float, level: Level) -> Samples:
    yield from heartbeat()
    for (name, value_of_label), count in counters.read().items():
        yield name, value_of_label, count
    yield "requests_active", "", active
    for state in State:
        yield "breaker_state", state.value, int(breaker.state is state)
    for pair, count in breaker.transitions.items():
        yield "breaker_transitions_total", _TRANSITIONS[pair], count
    yield "retry_budget", "", retry_budget
    yield "degradation_level", "", level
