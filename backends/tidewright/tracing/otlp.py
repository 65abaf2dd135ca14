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
_TIME = struct.Struct("<Q").pack  # fixed64
_TIME_SIZE = 8
_DOUBLE = struct.Struct("<d").pack
_PARENT = "2208"  # 4, with a length of 8; hexadecimal
_FLAGS = b"\x85\x01" + struct.pack("<I", 1)  # 16, fixed32: sampled
_SIZE_AFTER_NAME = 2 * (1 + _TIME_SIZE) + len(_FLAGS)


Encoded = tuple[tuple[str, bytes], ...]
"""Spans of one trace, encoded, by service. Bytes, which the garbage collector does not look at."""


def encode(trace: Trace) -> Encoded:
    services: dict[str, list[bytes]] = {}
    head = b"\x0a\x10" + bytes.fromhex(trace.trace_id) + b"\x12\x08"
    for span in trace.spans:
        parts = services.get(span.service)
        if parts is None:
            parts = services[span.service] = []
        _add_span(parts, span, head)
    return tuple((service, b"".join(parts)) for service, parts in services.items())


def request_of(encoded: Iterable[Encoded], resource: Mapping[str, str]) -> bytes:
    """An OTLP request (ExportTraceServiceRequest). `resource`: attributes of the process, beside its service."""
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


def _add_span(parts: list[bytes], span: Span, head: bytes) -> None:
    """`parts`: of the spans before. `head`: the trace's id, and what comes before the span's."""
    name = _name_and_kind(span.name, span.kind)
    ids = bytes.fromhex(span.span_id + _PARENT + span.parent_id if span.parent_id else span.span_id)
    times = _TIMES(0x39, int(span.began * 1e9), 0x41, int(span.ended * 1e9))
    size = len(head) + len(ids) + len(name) + _SIZE_AFTER_NAME
    if not (span.attributes or span.events) and span.error is None:  # most of them
        parts += (b"\x12", _varint(size), head, ids, name, times, _FLAGS)
        return
    more = _attributes(b"\x4a", span.attributes) if span.attributes else []
    for event in span.events:
        if event.attributes:
            more.append(_field(b"\x5a", _event(event)))
        else:
            before, after = _plain_event(event.name)
            more += (before, _TIME(int(event.at * 1e9)), after)
    if span.error is not None:
        more.append(_field(b"\x7a", _field(b"\x12", _text(span.error)) + bytes((0x18, _ERROR))))
    content = b"".join(more)
    parts += (b"\x12", _varint(size + len(content)), head, ids, name, times, content, _FLAGS)


@lru_cache(_CACHED)
def _name_and_kind(name: str, kind: Kind) -> bytes:
    return _field(b"\x2a", _text(name)) + bytes((0x30, kind))


@lru_cache(_CACHED)
def _event_name(name: str) -> bytes:
    return _field(b"\x12", _text(name))


@lru_cache(_CACHED)
def _plain_event(name: str) -> tuple[bytes, bytes]:
    """What comes before and after the time of an event without attributes."""
    after = _event_name(name)
    return b"\x5a" + _varint(1 + _TIME_SIZE + len(after)) + b"\x09", after


def _event(event: Event) -> bytes:
    made = b"\x09" + _TIME(int(event.at * 1e9)) + _event_name(event.name)
    return made + b"".join(_attributes(b"\x1a", event.attributes))


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
    return tag + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    return _SHORT[number] if number < _MAX_SHORT else _long_varint(number)


def _long_varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    made.append(number)
    return bytes(made)


def _text(text: str) -> bytes:
    return text.encode(errors="replace")


_MAX_SHORT = 2048
_SHORT = tuple(map(_long_varint, range(_MAX_SHORT)))


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
