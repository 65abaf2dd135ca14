"""The bridge's histograms against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewright.bridge.stats import REQUEST_BUCKETS, TOKEN_BUCKETS, Histogram


@given(st.lists(st.tuples(st.floats(0, 10) | st.sampled_from([0.1, 0.5, 2.0]), st.integers(1, 5))))
def test_a_value_counts_in_the_first_bucket_that_holds_it(observed: list[tuple[float, int]]) -> None:
    bounds = (0.1, 0.5, 2.0)
    histogram = Histogram(bounds)
    for value, times in observed:
        histogram.observe(value, times)
    values = np.repeat([value for value, _ in observed], [times for _, times in observed])
    assert np.cumsum(histogram.counts).tolist() == [int((values <= bound).sum()) for bound in (*bounds, np.inf)]
    assert histogram.total == pytest.approx(float(values.sum()))


def test_a_copy_stands_still() -> None:
    histogram = Histogram((1.0,))
    histogram.observe(0.5)
    copy = histogram.copy()
    histogram.observe(3.0)
    assert (copy.counts, copy.total) == ([1, 0], 0.5)


@pytest.mark.parametrize("bounds", [REQUEST_BUCKETS, TOKEN_BUCKETS])
def test_bounds_rise(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))
