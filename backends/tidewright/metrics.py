"""Our metrics in Triton's own /metrics, refreshed on a timer: a metric call costs up to 90 µs.

Terms are Prometheus's. A metric has a name, a type and labels (`MetricSpec`); a series is a metric with values of its
labels; a sample is a series' value at one moment. `bridge/metrics.py` and `failsafe/metrics.py` list their metrics and
make the samples; `bridge/stats.py` is what the bridge counts and times on the way.

Histograms are made of counters, one a bucket: Triton's own kind takes one value a call, and we have one a token.
Prometheus stores the same series either way.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

REFRESH_INTERVAL = 0.25  # seconds
STOP_TIMEOUT = 2.0  # seconds
PREFIX = "tidewright_"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Label:
    name: str
    values: tuple[str, ...] = ()
    """All possible values; empty if they are not known beforehand."""


@dataclass(frozen=True)
class MetricSpec:
    """A metric as docs/metrics.md lists it; names have no prefix."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    """Of a histogram: upper bounds, without +Inf."""

    @property
    def label_values(self) -> tuple[str, ...]:
        """Values of its only label; one empty text if it has none."""
        return self.labels[0].values if self.labels else ("",)


HEARTBEAT = MetricSpec(
    "heartbeat_timestamp_seconds",
    "gauge",
    "When the model's Python process last updated these metrics, in Unix time; Triton keeps the last values of one "
    "that died",
)

Samples = Iterator[tuple[str, str, float]]
"""Of all series, as they are now: name without prefix, value of its label or "", value."""


def heartbeat() -> Samples:
    """Whole seconds, as each change costs a call."""
    yield HEARTBEAT.name, "", float(int(time.time()))


class MetricsMirror:
    """A thread that copies samples into Triton's metrics; `family` is pb_utils.MetricFamily."""

    def __init__(
        self,
        specs: tuple[MetricSpec, ...],
        samples: Callable[[], Samples],
        family: Any,
        prefix: str = PREFIX,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """`labels`: that all series have beside their own."""
        self._samples, self._prefix, self._labels = samples, prefix, dict(labels or {})
        self._family = family
        self._families: list[Any] = []  # a metric dies with its family
        self._gauges: set[str] = set()
        self._metrics: dict[tuple[str, str], Any] = {}
        for spec in specs:
            if spec.kind == "histogram":
                bounds = (*(f"{bound:g}" for bound in spec.buckets), "+Inf")
                self._make(f"{spec.name}_bucket", family.COUNTER, spec.meaning, Label("le", bounds))
                self._make(f"{spec.name}_sum", family.COUNTER, spec.meaning)
                self._make(f"{spec.name}_count", family.COUNTER, spec.meaning)
                continue
            kind = family.GAUGE if spec.kind == "gauge" else family.COUNTER
            self._make(spec.name, kind, spec.meaning, *spec.labels)
            if spec.kind == "gauge":
                self._gauges.add(spec.name)
        # Of a gauge the first value counts even if it is zero: a stub that died may have left another one.
        self._last = {key: math.nan if key[0] in self._gauges else 0.0 for key in self._metrics}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT)
        self._metrics.clear()
        self._families.clear()

    def refresh(self) -> None:
        """Bring Triton's metrics up to date; only what has changed costs a call."""
        for name, value_of_label, value in self._samples():
            key = name, value_of_label
            before, self._last[key] = self._last[key], value
            if value == before:
                continue
            if name in self._gauges:
                self._metrics[key].set(value)
            else:
                self._metrics[key].increment(value - before)

    def _make(self, name: str, kind: Any, meaning: str, label: Label | None = None) -> None:
        made = self._family(name=f"{self._prefix}{name}", description=meaning, kind=kind)
        self._families.append(made)
        for value in label.values if label else ("",):
            self._metrics[name, value] = made.Metric(labels=self._labels | ({label.name: value} if label else {}))

    def _loop(self) -> None:
        failing = False
        while not self._stopping.wait(REFRESH_INTERVAL):
            try:
                self.refresh()
                failing = False
            except Exception:
                if not failing:
                    log.exception("the samples could not be copied into Triton's metrics; trying again")
                failing = True
