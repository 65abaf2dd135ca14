"""The spans of one request that has ended, made of its record."""

from __future__ import annotations

import msgspec

from tidewright.schema import Timings
from tidewright.tracing.exporter import Pending
from tidewright.tracing.replica_spans import replica_spans
from tidewright.tracing.span import Attributes, Event, Kind, Span
from tidewright.tracing.trace_context import new_span_id
from tidewright_gateway.tracing.context import TraceContext
from tidewright_gateway.tracing.record import AttemptNote, Phase, Record

_decode_timings = msgspec.json.Decoder(Timings).decode
_WELL = ("success", "cancelled")


class RequestTrace(Pending):
    """Holds nothing of the request itself, which may be large."""

    def __init__(
        self,
        trace: TraceContext,
        record: Record,
        name: str,
        attributes: Attributes,
        error: str | None,
        began: float,
        ended: float,
        first_token: float | None,
        clock: float,
    ) -> None:
        """Times are of time.monotonic(); `clock` makes them those of time.time()."""
        self.trace_id, self._trace, self._record = trace.trace_id, trace, record
        self._name, self._attributes, self._error = name, attributes, error
        self._began, self._ended, self._first_token, self._clock = began, ended, first_token, clock
        # Four of the replica for each attempt that it has told of.
        told = sum(5 if note.timings else 1 for note in record.attempts)
        self.num_spans = 1 + len(record.phases) + bool(record.open) + bool(first_token) + told

    def spans(self) -> list[Span]:
        record, root_id, clock = self._record, self._trace.span_id, self._clock
        events = [Event(name, at + clock) for name, at in record.events]
        root = Span(
            self._name,
            root_id,
            self._trace.parent_id,
            self._began + clock,
            self._ended + clock,
            self._attributes,
            events,
            Kind.SERVER,
            self._error,
        )
        spans = [root, *(self._of_phase(phase) for phase in record.phases)]
        if record.open:
            name, began = record.open
            span = self._span(name, began, self._ended)
            code = self._attributes.get("error.type")  # also of a refusal, which is no error of the server
            span.error = None if code is None else str(code)
            spans.append(span)
        for note in record.attempts:
            spans += self._of_attempt(note)
        if self._first_token:
            spans.append(self._span("stream", self._first_token, self._ended))
        return spans

    def _span(self, name: str, began: float, ended: float, span_id: str = "") -> Span:
        clock = self._clock
        return Span(name, span_id or new_span_id(), self._trace.span_id, began + clock, ended + clock)

    def _of_phase(self, phase: Phase) -> Span:
        span = self._span(phase.name, phase.began, phase.ended)
        if phase.choice:
            span.attributes = {"tidewright.choice": phase.choice}
        return span

    def _of_attempt(self, note: AttemptNote) -> list[Span]:
        span = self._span("attempt", note.began, note.ended, note.span_id)
        span.kind = Kind.CLIENT
        span.attributes = {
            "tidewright.replica": note.replica,
            "tidewright.model": note.model,
            "tidewright.choice": note.choice,
            "tidewright.outcome": note.outcome,
            "tidewright.tokens_before": note.tokens_before,
            "gen_ai.usage.output_tokens": note.tokens,
        }
        span.error = None if note.outcome in _WELL else note.outcome
        if not note.timings:
            return [span]
        try:
            timings = _decode_timings(note.timings)
        except msgspec.MsgspecError:  # of a newer replica
            return [span]
        return [span, *replica_spans(timings, note.span_id, note.replica)]
