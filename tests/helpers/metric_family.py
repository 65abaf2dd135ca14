"""In the place of Triton's metrics."""

from __future__ import annotations

from collections import Counter


class Family:
    """Like pb_utils.MetricFamily; keeps every series' value, and refuses what Triton refuses."""

    GAUGE, COUNTER = "gauge", "counter"
    series: dict[str, float]
    calls: Counter[str]

    @classmethod
    def fresh(cls) -> type[Family]:
        return type("FreshFamily", (cls,), {"series": {}, "calls": Counter()})

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802
        key = self.name + "".join(f"{{{name}={value}}}" for name, value in labels.items())
        assert key not in self.series
        self.series[key] = 0.0
        return Metric(self, key)


class Metric:
    def __init__(self, family: Family, key: str) -> None:
        self.family, self.key = family, key

    def set(self, value: float) -> None:
        assert self.family.kind == "gauge"
        self.family.series[self.key] = value
        self.family.calls[self.key] += 1

    def increment(self, value: float) -> None:
        assert self.family.kind == "counter"
        assert value > 0
        self.family.series[self.key] += value
        self.family.calls[self.key] += 1
