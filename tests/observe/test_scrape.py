"""observe/scrape.py: rates and quantiles of what changed between two scrapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from tidewright.observe.scrape import Change, ScrapeError, parse

BOUNDS = (0.1, 0.5, 1.0, 5.0)


@given(
    st.lists(st.floats(0, 10), max_size=50),
    st.lists(st.floats(0, 10), min_size=1, max_size=50),
    st.sampled_from([0.5, 0.9, 0.99]),
)
def test_a_quantile_is_that_of_the_values_since_the_last_scrape(old: list[float], new: list[float], q: float) -> None:
    registry = CollectorRegistry()
    histogram = Histogram("h", "", registry=registry, buckets=BOUNDS)
    for value in old:
        histogram.observe(value)
    before = parse(generate_latest(registry).decode(), 0.0)
    for value in new:
        histogram.observe(value)
    found = Change(before, parse(generate_latest(registry).decode(), 1.0)).quantile("h", q)
    counts = [sum(value <= bound for value in new) for bound in BOUNDS]
    if q * len(new) > counts[-1]:
        assert found == BOUNDS[-1]  # as in Prometheus, it is not known how much more
        return
    steps = [(0.0, 0)] + [
        (bound, count) for bound, count, last in zip(BOUNDS, counts, [0, *counts], strict=False) if count > last
    ]
    # Where buckets are empty, the quantile begins at the bound below.
    low = max((bound for bound, count in zip((0.0, *BOUNDS), (0, *counts), strict=True) if count < q * len(new)))
    high, at_high = next(step for step in steps if step[1] >= q * len(new))
    at_low = max(count for bound, count in zip((0.0, *BOUNDS), (0, *counts), strict=True) if bound <= low)
    assert found == pytest.approx(np.interp(q * len(new), [at_low, at_high], [low, high]))


def test_rates_are_per_second_and_a_restart_counts_from_zero() -> None:
    registry = CollectorRegistry()
    counter = Counter("c", "", ["key", "kind"], registry=registry)
    counter.labels("a", "x").inc(10)
    counter.labels("b", "x").inc(100)
    before = parse(generate_latest(registry).decode(), 10.0)
    counter.labels("a", "x").inc(4)
    counter.labels("a", "y").inc(6)  # new
    counter.remove("b", "x")
    counter.labels("b", "x").inc(8)
    change = Change(before, parse(generate_latest(registry).decode(), 12.0))
    assert change.rates("c_total", "key") == {"a": 5.0, "b": 4.0}
    assert change.rates("c_total", "key", kind="x") == {"a": 2.0, "b": 4.0}
    assert change.rate("c_total", key="a") == 5.0
    assert change.rates("other_total", "key") == {}


def test_triton_declares_histograms_as_counters() -> None:
    lines = [
        '# TYPE h_bucket counter\nh_bucket{le="1"} 3\nh_bucket{le="+Inf"} 4',
        "# TYPE nv_count counter\nnv_count 7",
    ]
    scrape = parse("\n".join(lines) + "\n", 0.0)
    assert scrape.by("h_bucket", "le") == {"1": 3, "+Inf": 4}
    assert scrape.total("nv_count") == 7


@pytest.mark.parametrize("text", ["<html>", '{"a": 1}', 'x{a="', "x y z"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ScrapeError, match="no Prometheus endpoint"):
        parse(text, 0.0)
