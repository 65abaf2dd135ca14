"""Which trace a request belongs to, and whether it is sampled from the start."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from tidewright.tracing.trace_context import TraceParent, new_span_id, parse_traceparent, traceparent_of

# What gRPC takes as a value. The specification asks for 512 characters at least to be handed on.
_TRACESTATE = re.compile(rb"[\x21-\x7e]([\x20-\x7e]{0,1022}[\x21-\x7e])?")
_RATIO_BITS = 64


@dataclass(frozen=True)
class TraceContext:
    trace_id: str
    """32 hexadecimal digits; the access log has it, sampled or not."""
    span_id: str
    """16 digits: the gateway's own, which is the parent of what the replica records."""
    sampled: bool
    tracestate: str = ""
    parent_id: str = ""
    """The caller's span; empty if the trace begins here."""

    @property
    def traceparent(self) -> str:
        return traceparent_of(TraceParent(self.trace_id, self.span_id, self.sampled))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """For the call to the replica. Empty if not sampled: Triton records all that come with a trace, flag or not."""
        if not self.sampled:
            return ()
        parent = ("traceparent", self.traceparent)
        return (parent, ("tracestate", self.tracestate)) if self.tracestate else (parent,)

    def child(self) -> TraceContext:
        """A further span in this trace."""
        return TraceContext(self.trace_id, new_span_id(), self.sampled, self.tracestate, self.span_id)


class Tracer:
    def __init__(self, ratio: float, trusts_callers: bool = False) -> None:
        """`ratio`: share of the traces to be recorded, from 0 to 1. `trusts_callers`: of those that begin elsewhere,
        whoever began them says whether they are."""
        self._threshold, self._trusts_callers = round(ratio * (1 << _RATIO_BITS)), trusts_callers

    def begin(self, headers: Iterable[tuple[bytes, bytes]]) -> TraceContext:
        """The request's trace; a new one if it has none, or one that can't be read. Header names are in lower case."""
        parents, states = [], []
        for name, value in headers:
            if name == b"traceparent":
                parents.append(value)
            elif name == b"tracestate":
                states.append(value)
        if len(parents) == 1 and (parent := parse_traceparent(parents[0].decode("latin-1"))):
            sampled = parent.sampled if self._trusts_callers else self._samples(parent.trace_id)
            state = b",".join(states)
            tracestate = state.decode() if _TRACESTATE.fullmatch(state) else ""
            return TraceContext(parent.trace_id, new_span_id(), sampled, tracestate, parent.span_id)
        trace_id = secrets.token_hex(16)
        return TraceContext(trace_id, new_span_id(), self._samples(trace_id))

    def _samples(self, trace_id: str) -> bool:
        """By the id itself, as others who see this trace may decide by it as well."""
        return int(trace_id[-_RATIO_BITS // 4 :], 16) < self._threshold
