"""docs/metrics.md is what the catalogue makes of it, and the catalogue's names follow Prometheus' conventions."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tidewright.metrics import MetricSpec
from tidewright_gateway.metrics.catalogue import CATALOGUE

DOCS = Path(__file__).resolve().parents[1] / "docs"
OURS = [
    pytest.param(spec, id=f"{prefix}{spec.name}")
    for prefix, specs in CATALOGUE.items()
    for spec in specs
    if prefix.startswith("tidewright_")
]


def test_the_page_is_up_to_date() -> None:
    made = runpy.run_path(str(DOCS / "make_metrics.py"))["page"]()
    assert (DOCS / "metrics.md").read_text() == made, "python docs/make_metrics.py"


@pytest.mark.parametrize("spec", OURS)
def test_names_and_buckets_are_as_prometheus_wants_them(spec: MetricSpec) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", spec.name)
    assert spec.name.endswith("_total") == (spec.kind == "counter")
    assert bool(spec.buckets) == (spec.kind == "histogram")
    assert list(spec.buckets) == sorted(set(spec.buckets))
    assert not re.search(r"_(ms|us|milliseconds|minutes|kib|mib|percent)(_|$)", spec.name)
    assert all(re.fullmatch(r"[a-z][a-z_]*", label.name) for label in spec.labels)


def test_no_name_stands_twice() -> None:
    names = [prefix + spec.name for prefix, specs in CATALOGUE.items() for spec in specs]
    assert len(names) == len(set(names))
