"""One request over all processes: a tree of spans, log lines, and where the time went. No I/O."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

REQUEST_ID = "tidewright.request_id"
ACCESS_EVENTS = ("request", "request_refused")
"""Events of the access log."""
MAX_SHARED = 1000  # spans that the time is shared among: it takes the square of their number


@dataclass(frozen=True)
class Event:
    at: float
    name: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """As a tracing backend has it. Times are Unix times in seconds."""

    trace_id: str
    span_id: str
    parent_id: str
    """Empty for none."""
    name: str
    service: str
    began: float
    ended: float
    attributes: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Event] = ()
    error: str | None = None
    """Why it failed, if it did; may be empty."""

    @property
    def seconds(self) -> float:
        return max(self.ended - self.began, 0.0)


@dataclass(frozen=True)
class LogLine:
    at: float
    level: str
    process: str
    event: str
    message: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The other fields."""


@dataclass(frozen=True)
class Node:
    span: Span
    depth: int
    """Number of spans above it."""


@dataclass(frozen=True)
class Timeline:
    """Of one request or trace."""

    nodes: Sequence[Node]
    """Each span after the one above it, in order of time."""
    lines: Sequence[LogLine]
    """In order of time."""

    @property
    def began(self) -> float:
        return min(self._times, default=0.0)

    @property
    def ended(self) -> float:
        return max(self._times, default=0.0)

    @property
    def _times(self) -> Iterator[float]:
        for node in self.nodes:
            yield node.span.began
            yield node.span.ended
        for line in self.lines:
            yield line.at
            seconds = line.facts.get("seconds")
            if line.event in ACCESS_EVENTS and isinstance(seconds, int | float):  # it is written at the end
                yield line.at - seconds

    def exclusive(self) -> dict[str, float]:
        """Seconds by span name, the longest first: each moment of a top span counts for the deepest span that runs
        then, of several the one that began last."""
        found: defaultdict[str, float] = defaultdict(float)
        tops = [node.span for node in self.nodes if node.depth == 0]
        nodes = self.nodes[:MAX_SHARED]
        bounds = sorted({time for node in nodes for time in (node.span.began, node.span.ended)})
        for low, high in itertools.pairwise(bounds):
            if not any(top.began <= low and high <= top.ended for top in tops):
                continue
            active = (node for node in nodes if node.span.began <= low and high <= node.span.ended)
            deepest = max(active, key=lambda node: (node.depth, node.span.began))
            found[deepest.span.name] += high - low
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def unix_time(text: str) -> float:
    """Of a time in ISO 8601. Raises ValueError: it is none."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()  # before Python 3.11 without Z


def make_timeline(spans: Iterable[Span], lines: Iterable[LogLine], request_id: str | None = None) -> Timeline:
    """`request_id`: only the spans of this request, of a trace that has several; None for all."""
    by_id = {span.span_id: span for span in spans}  # some backends give a span twice
    below: defaultdict[str, list[Span]] = defaultdict(list)
    tops = []
    for span in by_id.values():
        if span.parent_id in by_id and span.parent_id != span.span_id:
            below[span.parent_id].append(span)
        else:
            tops.append(span)
    if request_id:
        tops = [span for span in by_id.values() if span.attributes.get(REQUEST_ID) == request_id] or tops
    nodes: list[Node] = []
    seen: set[str] = set()
    pending = [Node(span, 0) for span in sorted(tops, key=lambda span: span.began, reverse=True)]
    while pending:  # not recursive: the depth is the backend's
        node = pending.pop()
        if node.span.span_id in seen:
            continue
        seen.add(node.span.span_id)
        nodes.append(node)
        children = sorted(below[node.span.span_id], key=lambda span: span.began, reverse=True)
        pending += [Node(span, node.depth + 1) for span in children]
    return Timeline(nodes, sorted(lines, key=lambda line: line.at))
