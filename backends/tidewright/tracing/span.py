"""A span as a light record. OpenTelemetry's own objects cost several times as much to make and to encode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

Value = str | bool | int | float | list[str]
Attributes = Mapping[str, Value]

GATEWAY, ENGINE = "tidewright-gateway", "tidewright-engine"
"""Services, as a trace viewer groups spans; `ENGINE` has those of the bridge as well."""


class Kind(IntEnum):
    """With OTLP's numbers."""

    INTERNAL = 1
    SERVER = 2
    CLIENT = 3


@dataclass(slots=True)
class Event:
    name: str
    at: float
    attributes: Attributes = field(default_factory=dict)


@dataclass(slots=True)
class Span:
    """Times are of time.time(). Ids are hexadecimal digits."""

    name: str
    span_id: str
    parent_id: str
    """Empty for a span without a parent."""
    began: float
    ended: float
    attributes: Attributes = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    kind: Kind = Kind.INTERNAL
    error: str | None = None
    """Why it failed, if it did; the text may be empty."""
    service: str = GATEWAY


class Trace(NamedTuple):
    """Spans of one trace that came to be in one process."""

    trace_id: str
    spans: list[Span]
