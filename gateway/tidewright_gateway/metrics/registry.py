"""Makes the metrics of the catalogue, in one process or for several workers, and writes them down for Prometheus."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from tidewright.metrics import MetricSpec
from tidewright_gateway.metrics.families import GATEWAY, GATEWAY_PREFIX

OfWorkers = Literal["livesum", "livemin", "livemax"]
"""What the gauges of several workers are together."""

_SPECS = {spec.name: spec for spec in GATEWAY}
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

disable_created_metrics()  # a gauge beside each series of a counter, which nothing uses


class Registry:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        if not self.is_shared:
            ProcessCollector(registry=self._registry)

    @property
    def is_shared(self) -> bool:
        """Several workers have their metrics together. Their series can't be removed."""
        return bool(os.environ.get(_FOLDER))

    def counter(self, name: str) -> Counter:
        spec = _SPECS[name]
        made = Counter(GATEWAY_PREFIX + name, spec.meaning, _labels(spec), registry=self._registry)
        _begin(made, spec)
        return made

    def gauge(self, name: str, mode: OfWorkers) -> Gauge:
        spec = _SPECS[name]
        labels = _labels(spec)
        made = Gauge(GATEWAY_PREFIX + name, spec.meaning, labels, registry=self._registry, multiprocess_mode=mode)
        _begin(made, spec)
        return made

    def histogram(self, name: str) -> Histogram:
        spec = _SPECS[name]
        labels = _labels(spec)
        return Histogram(GATEWAY_PREFIX + name, spec.meaning, labels, registry=self._registry, buckets=spec.buckets)

    def text(self) -> bytes:
        """Of all workers."""
        if not self.is_shared:
            return generate_latest(self._registry)
        folder = os.environ[_FOLDER]
        for file in Path(folder).glob("gauge_live*.db"):
            pid = int(file.stem.rpartition("_")[2])
            if not psutil.pid_exists(pid):
                mark_process_dead(pid, folder)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, folder)
        return generate_latest(registry)


def _begin(metric: Counter | Gauge, spec: MetricSpec) -> None:
    """Makes series whose labels are known from the start: Prometheus would not see them grow for the first time."""
    if len(spec.labels) == 1:
        for value in spec.labels[0].values:
            metric.labels(value)


def _labels(spec: MetricSpec) -> list[str]:
    return [label.name for label in spec.labels]
