"""Spans in OTLP: protobuf for a collector, JSON for a file.

Protobuf is written here, field by field: OpenTelemetry's SDK takes seven times as long, and would double what a trace
costs the gateway (`python -m benchmarks.tracing encoding`). A test holds it against the SDK's encoder.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import msgspec

from tidewright.tracing.span import Attributes, Event, Kind, Span, Trace, Value

_SCOPE = "tidewright"
_ERROR = 2  # a status code
_CACHED = 4096  # attributes: most come again with each request

# A field's number and wire type, of opentelemetry/proto/trace/v1/trace.proto and common/v1/common.proto.
_TIMES = struct.Struct("<BQBQ").pack  # 7 and 8, fixed64
_EVENT_TIME = struct.Struct("<BQ").pack  # 1, fixed64
_DOUBLE = struct.Struct("<d").pack
_FLAGS = b"\x85\x01" + struct.pack("<I", 1)  # 16, fixed32: sampled


Encoded = tuple[tuple[str, bytes], ...]
"""Spans of one trace, encoded, by service. Bytes, which the garbage collector does not look at."""


def to_protobuf(traces: Iterable[Trace], resource: Mapping[str, str]) -> bytes:
    """An OTLP request (ExportTraceServiceRequest). `resource`: attributes of the process, beside its service."""
    return request_of(map(encode, traces), resource)


def encode(trace: Trace) -> Encoded:
    services: dict[str, list[bytes]] = {}
    head = b"\x0a\x10" + bytes.fromhex(trace.trace_id) + b"\x12\x08"
    for span in trace.spans:
        services.setdefault(span.service, []).append(_field(b"\x12", _span(span, head)))
    return tuple((service, b"".join(spans)) for service, spans in services.items())


def request_of(encoded: Iterable[Encoded], resource: Mapping[str, str]) -> bytes:
    """Of traces that are encoded already."""
    services: dict[str, list[bytes]] = {}
    for trace in encoded:
        for service, spans in trace:
            services.setdefault(service, []).append(spans)
    made = []
    for service, parts in services.items():
        about = b"".join(_attributes(b"\x0a", {**resource, "service.name": service}))
        scope = _field(b"\x0a", _field(b"\x0a", _SCOPE.encode()))
        of_service = _field(b"\x0a", about) + _field(b"\x12", scope + b"".join(parts))
        made.append(_field(b"\x0a", of_service))
    return b"".join(made)


def _span(span: Span, head: bytes) -> bytes:
    """`head`: the trace's id, and what comes before the span's."""
    parts = [head, bytes.fromhex(span.span_id)]
    if span.parent_id:
        parts.append(b"\x22\x08" + bytes.fromhex(span.parent_id))
    parts.append(_name_and_kind(span.name, span.kind))
    parts.append(_TIMES(0x39, int(span.began * 1e9), 0x41, int(span.ended * 1e9)))
    if span.attributes:
        parts += _attributes(b"\x4a", span.attributes)
    for event in span.events:
        parts.append(_field(b"\x5a", _event(event)))
    if span.error is not None:
        parts.append(_field(b"\x7a", _field(b"\x12", _text(span.error)) + bytes((0x18, _ERROR))))
    parts.append(_FLAGS)
    return b"".join(parts)


@lru_cache(_CACHED)
def _name_and_kind(name: str, kind: Kind) -> bytes:
    return _field(b"\x2a", _text(name)) + bytes((0x30, kind))


@lru_cache(_CACHED)
def _event_name(name: str) -> bytes:
    return _field(b"\x12", _text(name))


def _event(event: Event) -> bytes:
    made = _EVENT_TIME(0x09, int(event.at * 1e9)) + _event_name(event.name)
    return made + b"".join(_attributes(b"\x1a", event.attributes)) if event.attributes else made


def _attributes(tag: bytes, attributes: Attributes) -> list[bytes]:
    return [
        _make_attribute(tag, key, value) if isinstance(value, list) else _attribute(tag, key, value)
        for key, value in attributes.items()
    ]


def _make_attribute(tag: bytes, key: str, value: Value) -> bytes:
    return _field(tag, _field(b"\x0a", _text(key)) + _field(b"\x12", _any_value(value)))


_attribute = lru_cache(_CACHED, typed=True)(_make_attribute)  # 1, 1.0 and True are equal


def _any_value(value: Value) -> bytes:
    if isinstance(value, str):
        return _field(b"\x0a", _text(value))
    if isinstance(value, bool):
        return bytes((0x10, value))
    if isinstance(value, int):
        return b"\x18" + _varint(value % (1 << 64))  # two's complement
    if isinstance(value, float):
        return b"\x21" + _DOUBLE(value)
    return _field(b"\x2a", b"".join(_field(b"\x0a", _any_value(item)) for item in value))


def _field(tag: bytes, content: bytes) -> bytes:
    """One with a length."""
    size = len(content)
    return tag + (bytes((size,)) if size < 0x80 else _varint(size)) + content


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    made.append(number)
    return bytes(made)


def _text(text: str) -> bytes:
    return text.encode(errors="replace")


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
