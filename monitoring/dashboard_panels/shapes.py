"""What a dashboard is made of: rows, panels, queries. No Grafana here: tests read the queries from these as well."""

from __future__ import annotations

from dataclasses import dataclass

G = "tidewright_gateway_"
FAILING = ((0.001, "yellow"), (0.01, "red"))
FULL = ((0.8, "yellow"), (0.95, "red"))
"""Thresholds of shares."""
EACH_ENGINE = "{{instance}} {{model}}"
"""Legend of an engine's series. Only models beside the first of a server have the label: Grafana leaves it out else."""
PERCENTILES = (("0.5", "p50"), ("0.95", "p95"), ("0.99", "p99"))


@dataclass(frozen=True)
class Query:
    expr: str
    legend: str = "{{instance}}"


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str  # Grafana's name of it
    queries: tuple[Query, ...]
    description: str = ""
    thresholds: tuple[tuple[float, str], ...] = ()  # from this value on, this color
    is_stat: bool = False  # one big number
    is_stacked: bool = False
    is_share: bool = True  # of a ratio: 1 is the most


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    name: str  # of the file
    title: str
    description: str
    rows: tuple[Row, ...]
    instances_of: str = ""  # the metric whose instances can be chosen, as $instance


def quantiles(metric: str, by: str = "", window: str = "5m") -> tuple[Query, ...]:
    """Of a histogram, over all that `by` does not name."""
    grouping, prefix = (f"{by}, le", f"{{{{{by}}}}} ") if by else ("le", "")
    return tuple(
        Query(f"histogram_quantile({q}, sum by ({grouping}) (rate({metric}_bucket[{window}])))", f"{prefix}{name}")
        for q, name in PERCENTILES
    )
