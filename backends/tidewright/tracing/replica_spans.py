"""Spans of what a replica did with a request, from the times that its bridge and its engine have measured."""

from __future__ import annotations

from tidewright.schema import SequenceTimings, Timings
from tidewright.tracing.span import ENGINE, Event, Span
from tidewright.tracing.trace_context import new_span_id


def replica_spans(timings: Timings, parent_id: str, replica: str = "", error: str | None = None) -> list[Span]:
    """`bridge`, and below it `engine.queue`, `engine.prefill` and `engine.decode` of each sequence.

    Args:
        parent_id: of the span that called the replica; Triton's own comes before it, if it made one.
        replica: its address, where known.
        error: why it failed, if it did.
    """
    start = timings.arrived
    bridge = Span(
        "bridge", new_span_id(), timings.triton_span or parent_id, start, start + timings.ended, service=ENGINE
    )
    bridge.attributes = {"tidewright.replica": replica} if replica else {}
    bridge.events = [Event("validated", start + timings.validated)]
    bridge.error = error
    spans = [bridge]
    for index, sequence in enumerate(timings.sequences):
        spans += _of_sequence(bridge, timings, sequence, index)
    return spans


def _of_sequence(bridge: Span, timings: Timings, times: SequenceTimings, index: int) -> list[Span]:
    choice = {"tidewright.choice": index} if len(timings.sequences) > 1 else {}
    if times.sent is None:
        return []
    bridge.events.append(Event("sent_to_engine", timings.arrived + times.sent, choice))
    end = timings.ended if times.ended is None else times.ended
    bounds = [times.sent, times.began, times.first_token, end]
    names = ("engine.queue", "engine.prefill", "engine.decode")
    spans = []
    for name, began, ended in zip(names, bounds, bounds[1:], strict=False):
        if began is None:
            break
        until = end if ended is None else ended
        # Clocks of one host, read in two processes: never before its beginning.
        first, last = timings.arrived + began, timings.arrived + max(until, began)
        spans.append(Span(name, new_span_id(), bridge.span_id, first, last, dict(choice), service=ENGINE))
    if times.began is not None:
        spans[1].attributes = {
            **choice,
            "tidewright.prefill.chunks": times.chunks,
            "gen_ai.usage.cache_read.input_tokens": times.cached_tokens,
        }
    if times.first_token is not None and times.began is not None:
        decode = spans[2]
        decode.attributes = {**choice, "gen_ai.usage.output_tokens": times.tokens}
        decode.events.append(Event("first_token", decode.began))
    for what, at in times.events:
        event = Event(what, timings.arrived + at, choice)
        holder = next((span for span in reversed(spans) if span.began <= event.at <= span.ended), bridge)
        holder.events.append(event)
    return spans
