"""observe/timeline.py: the tree of spans, and where the time went."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewright.observe.timeline import REQUEST_ID, LogLine, Span, make_timeline


def span(own: str, parent: str, began: float, ended: float, name: str = "", **attributes: str) -> Span:
    return Span(
        "t", own, parent, name or own, "s", began, ended, {k.replace("__", "."): v for k, v in attributes.items()}
    )


def test_the_tree_is_in_order_and_each_moment_counts_for_the_deepest_span() -> None:
    spans = [
        span("decode", "bridge", 5, 9),
        span("attempt", "root", 2, 10),
        span("queue", "root", 1, 2),
        span("root", "elsewhere", 0, 10),
        span("bridge", "attempt", 3, 9),
    ]
    timeline = make_timeline(spans, [])
    assert [(node.span.name, node.depth) for node in timeline.nodes] == [
        ("root", 0),
        ("queue", 1),
        ("attempt", 1),
        ("bridge", 2),
        ("decode", 3),
    ]
    assert timeline.exclusive() == {"decode": 4, "attempt": 2, "bridge": 2, "root": 1, "queue": 1}


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12), st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=12
    )
)
def test_whatever_the_spans_are_each_is_shown_once_and_no_time_counts_twice(
    given_spans: list[tuple[int, int, float, float]],
) -> None:
    spans = [span(str(own), str(parent), min(a, b), max(a, b)) for own, parent, a, b in given_spans]
    timeline = make_timeline(spans, [])
    shown = [node.span.span_id for node in timeline.nodes]
    assert len(shown) == len(set(shown))
    # Spans in a ring have no top, and are left out.
    assert set(shown) <= {one.span_id for one in spans}
    total = timeline.ended - timeline.began
    assert sum(timeline.exclusive().values()) <= total + 1e-6
    tops = [node.span for node in timeline.nodes if node.depth == 0]
    if len(tops) == 1:
        assert sum(timeline.exclusive().values()) == pytest.approx(tops[0].seconds, abs=1e-6)


def test_of_a_trace_with_several_requests_one_is_shown() -> None:
    own = {REQUEST_ID.replace(".", "__"): "req-1"}
    spans = [
        span("agent", "", 0, 10),
        span("first", "agent", 1, 2, **own),
        span("second", "agent", 3, 4, **{REQUEST_ID.replace(".", "__"): "req-2"}),
        span("child", "first", 1, 2),
    ]
    assert [node.span.name for node in make_timeline(spans, [], "req-1").nodes] == ["first", "child"]
    assert len(make_timeline(spans, [], "unknown").nodes) == 4


def test_the_access_logs_line_is_written_at_the_end() -> None:
    timeline = make_timeline([], [LogLine(100.0, "info", "gateway", "request", "", {"seconds": 4.0})])
    assert (timeline.began, timeline.ended) == (96.0, 100.0)
