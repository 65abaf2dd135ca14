"""Tells the requests of one id from each other: a caller may send the same X-Request-Id again. No I/O."""

from __future__ import annotations

from collections import defaultdict

from tidewright.observe.records import Found
from tidewright.observe.timeline import LogLine, Span, Timeline, make_timeline


def timelines(found: Found, request_id: str | None) -> list[Timeline]:
    """A timeline for each request, the newest first. A request is known by its trace.

    Args:
        request_id: None if all is of one trace.
    """
    traces = sorted(found.traces_of(request_id)) if request_id else []
    if len(traces) < 2:
        return [make_timeline(found.spans, found.lines, request_id)]
    spans: defaultdict[str, list[Span]] = defaultdict(list)
    lines: defaultdict[str, list[LogLine]] = defaultdict(list)
    for span in found.spans:
        spans[span.trace_id].append(span)
    untraced = []
    for line in found.lines:
        if trace_id := str(line.facts.get("trace_id") or ""):
            lines[trace_id].append(line)
        else:
            untraced.append(line)
    made = {trace_id: make_timeline(spans[trace_id], lines[trace_id], request_id) for trace_id in traces}
    for line in untraced:  # it is of the request that ran then, or was nearest
        nearest = min(traces, key=lambda trace_id, at=line.at: _distance(made[trace_id], at))  # type: ignore[misc]
        lines[nearest].append(line)
    again = (make_timeline(spans[trace_id], lines[trace_id], request_id) for trace_id in traces)
    return sorted(again, key=lambda timeline: timeline.began, reverse=True)


def trace_of(timeline: Timeline) -> str:
    """Id of its trace; empty if nothing names it."""
    named = (node.span.trace_id for node in timeline.nodes)
    return next(named, "") or next(
        (str(line.facts["trace_id"]) for line in timeline.lines if "trace_id" in line.facts), ""
    )


def _distance(timeline: Timeline, at: float) -> float:
    """Seconds from a time to a request; 0 while it ran."""
    return max(timeline.began - at, at - timeline.ended, 0.0)
