"""Spans in OTLP: protobuf for a collector, JSON for a file.

Encoded with OpenTelemetry's own protobuf messages, but not by its SDK, whose spans and encoder take five times as long
(`python -m benchmarks.tracing encoding`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1 import trace_pb2

from tidewright.tracing.span import Attributes, Span, Trace, Value

_SCOPE = "tidewright"
_ERROR = trace_pb2.Status.STATUS_CODE_ERROR


def to_protobuf(traces: Iterable[Trace], resource: Mapping[str, str]) -> bytes:
    """An OTLP request. `resource`: attributes of the process, beside its service."""
    request = ExportTraceServiceRequest()
    services: dict[str, Any] = {}
    for trace in traces:
        trace_id = bytes.fromhex(trace.trace_id)
        for span in trace.spans:
            spans = services.get(span.service)
            if spans is None:
                spans = services[span.service] = _begin(request, span.service, resource)
            _add(spans, span, trace_id)
    return request.SerializeToString()


def to_json_lines(traces: Iterable[Trace], resource: Mapping[str, str]) -> bytes:
    """An OTLP request in JSON on a line of its own for each span, as collectors read them from files."""
    lines = (
        msgspec.json.encode(_request(span, trace.trace_id, resource)) + b"\n"
        for trace in traces
        for span in trace.spans
    )
    return b"".join(lines)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _begin(request: ExportTraceServiceRequest, service: str, resource: Mapping[str, str]) -> Any:
    added = request.resource_spans.add()
    _add_attributes(added.resource.attributes, {**resource, "service.name": service})
    scope_spans = added.scope_spans.add()
    scope_spans.scope.name = _SCOPE
    return scope_spans.spans


def _add(spans: Any, span: Span, trace_id: bytes) -> None:
    made = spans.add(
        trace_id=trace_id,
        span_id=bytes.fromhex(span.span_id),
        parent_span_id=bytes.fromhex(span.parent_id),
        name=span.name,
        kind=int(span.kind),
        start_time_unix_nano=_nanoseconds(span.began),
        end_time_unix_nano=_nanoseconds(span.ended),
        flags=1,
    )
    if span.attributes:
        _add_attributes(made.attributes, span.attributes)
    for event in span.events:
        added = made.events.add(name=event.name, time_unix_nano=_nanoseconds(event.at))
        if event.attributes:
            _add_attributes(added.attributes, event.attributes)
    if span.error is not None:
        made.status.code, made.status.message = _ERROR, span.error


def _add_attributes(to: Any, attributes: Attributes) -> None:
    for key, value in attributes.items():
        made = to.add(key=key).value
        if isinstance(value, str):
            made.string_value = value
        elif isinstance(value, bool):
            made.bool_value = value
        elif isinstance(value, int):
            made.int_value = value
        elif isinstance(value, float):
            made.double_value = value
        else:
            made.array_value.SetInParent()
            for item in value:
                made.array_value.values.add().string_value = item


def _request(span: Span, trace_id: str, resource: Mapping[str, str]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "traceId": trace_id,
        "spanId": span.span_id,
        "parentSpanId": span.parent_id,
        "name": span.name,
        "kind": int(span.kind),
        "startTimeUnixNano": str(_nanoseconds(span.began)),
        "endTimeUnixNano": str(_nanoseconds(span.ended)),
        "flags": 1,
        "attributes": _in_json(span.attributes),
        "events": [
            {"name": event.name, "timeUnixNano": str(_nanoseconds(event.at)), "attributes": _in_json(event.attributes)}
            for event in span.events
        ],
        "status": {} if span.error is None else {"code": _ERROR, "message": span.error},
    }
    about = {"attributes": _in_json({**resource, "service.name": span.service})}
    return {"resourceSpans": [{"resource": about, "scopeSpans": [{"scope": {"name": _SCOPE}, "spans": [made]}]}]}


def _in_json(attributes: Attributes) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Value) -> dict[str, Any]:
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    return {"arrayValue": {"values": [{"stringValue": item} for item in value]}}
