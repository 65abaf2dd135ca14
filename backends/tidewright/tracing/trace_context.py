"""W3C Trace Context: a `traceparent` read and written. Own code: OpenTelemetry's takes 6 to 25 µs for what takes 3."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

PARAMETER = "traceparent"
"""A parameter of Triton's request, and a field of its own trace context."""
MAX_LENGTH = 256  # characters; version 00 has 55, a later one may have more
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_random = random.Random()  # seeded by the system; spans need no secrets


class TraceParent(NamedTuple):
    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 digits: the span that the next one is a child of."""
    sampled: bool


def parse_traceparent(text: str) -> TraceParent | None:
    """None if it is not valid."""
    match = _TRACEPARENT.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if not match:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceParent(trace_id, span_id, bool(int(flags, 16) & 1))


def new_span_id() -> str:
    return f"{_random.getrandbits(64) or 1:016x}"


def traceparent_of(trace: TraceParent) -> str:
    return f"00-{trace.trace_id}-{trace.span_id}-0{trace.sampled:d}"
