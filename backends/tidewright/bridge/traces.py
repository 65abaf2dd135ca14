"""Spans of requests that come to Triton without the gateway, which else makes them (docs/tracing.md)."""

from __future__ import annotations

import json
import threading
from collections import Counter

from tidewright.bridge.active_request import ActiveRequest, Origin
from tidewright.schema import MAX_PARAMETERS_LENGTH, FinishReason, Timings
from tidewright.tracing.exporter import Exporter, Pending
from tidewright.tracing.replica_spans import replica_spans
from tidewright.tracing.span import Span
from tidewright.tracing.trace_context import PARAMETER, TraceParent, parse_traceparent

STOP_TIMEOUT = 1.0  # seconds
EXPORTED = "exported"
_WELL: tuple[FinishReason, ...] = ("stop", "length", "cancelled")


def origin_of(parameters: str, tritons: str | None) -> Origin | None:
    """What a request is part of; None if it says nothing of use.

    Args:
        parameters: of Triton's request, in JSON.
        tritons: the context of Triton's own span, in JSON, if it traces this request.
    """
    if own := _traceparent(tritons or ""):
        return Origin(own, True)
    given = _traceparent(parameters)
    return Origin(given, False) if given else None


def _traceparent(text: str) -> TraceParent | None:
    if f'"{PARAMETER}"' not in text or len(text) > MAX_PARAMETERS_LENGTH:
        return None
    try:
        value = json.loads(text)[PARAMETER]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return parse_traceparent(value) if isinstance(value, str) else None


class BridgeTraces:
    """For the sender's threads."""

    def __init__(self, endpoint: str) -> None:
        """Raises ValueError: it can't be used."""
        self._lock = threading.Lock()
        self._spans: Counter[str] = Counter()
        self._exporter = Exporter(endpoint, self._count_exported, self._count)
        self._exporter.start()

    def ended(self, request: ActiveRequest, reason: FinishReason) -> None:
        origin = request.origin
        if origin and origin.trace.sampled and not request.parsed.returns.timings:
            self._exporter.put(_Pending(request.timings(), origin, None if reason in _WELL else reason))

    def stop(self) -> None:
        self._exporter.stop(STOP_TIMEOUT)

    def read_spans(self) -> Counter[str]:
        """How many were exported, and how many were dropped for each reason."""
        with self._lock:
            return self._spans.copy()

    def _count_exported(self, count: int) -> None:
        self._count(EXPORTED, count)

    def _count(self, what: str, count: int) -> None:
        with self._lock:
            self._spans[what] += count


class _Pending(Pending):
    def __init__(self, timings: Timings, origin: Origin, error: str | None) -> None:
        self.trace_id, self.num_spans = origin.trace.trace_id, 1 + 3 * len(timings.sequences)
        self._timings, self._parent_id, self._error = timings, origin.trace.span_id, error

    def spans(self) -> list[Span]:
        return replica_spans(self._timings, self._parent_id, error=self._error)
