"""Finds a request in files: spans in OTLP's JSON lines, log lines in JSON. A file may hold both, and may be gzipped."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tidewright.observe.timeline import REQUEST_ID, Event, LogLine, Span, unix_time

MAX_FOUND = 20_000  # spans and lines
MAX_LINE = 4 * 2**20  # bytes; longer ones are passed over
_OF_EVERY_LINE = ("time", "level", "process", "event", "message")


class RecordsError(Exception):
    """A file can't be read; the message says why."""


@dataclass
class Found:
    spans: list[Span] = field(default_factory=list)
    lines: list[LogLine] = field(default_factory=list)
    left_out: bool = False
    """There was more than is kept."""

    def traces_of(self, request_id: str) -> set[str]:
        """Ids of the traces that the request is in."""
        found = {span.trace_id for span in self.spans if span.attributes.get(REQUEST_ID) == request_id}
        of_lines = (line.facts for line in self.lines if _is_of(line.facts, request_id))
        return found | {str(facts["trace_id"]) for facts in of_lines if facts.get("trace_id")}


def search(paths: Iterable[Path], wanted: str) -> Found:
    """All that has `wanted`, the id of a request or a trace.

    Raises:
        RecordsError: a file can't be read.
    """
    found, needle = Found(), wanted.encode()
    for path in paths:
        for line in _lines(path, needle):
            if len(found.spans) + len(found.lines) >= MAX_FOUND:
                found.left_out = True
                return found
            _take(found, line, wanted)
    return found


def _lines(path: Path, needle: bytes) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            while line := file.readline(MAX_LINE):
                if needle in line:
                    yield line
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise RecordsError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _take(found: Found, line: bytes, wanted: str) -> None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # such as a line that a full disk has cut
        return
    if not isinstance(record, dict):
        return
    if "resourceSpans" in record:
        found.spans += (span for span in spans_of(record) if wanted in (span.trace_id, span.attributes.get(REQUEST_ID)))
    elif (record.get("trace_id") == wanted or _is_of(record, wanted)) and (made := _line_of(record)):
        found.lines.append(made)


def _is_of(record: Any, request_id: str) -> bool:
    """On a replica, a request's id is followed by the number of the generation."""
    own = str(record.get("request_id", ""))
    return own == request_id or (own.startswith(f"{request_id}-") and own[len(request_id) + 1 :].isdecimal())


def _line_of(record: dict[str, Any]) -> LogLine | None:
    try:
        at = unix_time(str(record["time"]))
    except (KeyError, ValueError):
        return None
    level, process, event, message = (str(record.get(name, "")) for name in _OF_EVERY_LINE[1:])
    return LogLine(at, level, process, event, message, {k: v for k, v in record.items() if k not in _OF_EVERY_LINE})


def spans_of(request: dict[str, Any]) -> Iterator[Span]:
    """Of an OTLP request in JSON; those that can't be read are passed over."""
    for of_resource in _items(request, "resourceSpans"):
        try:
            service = str(_attributes(of_resource.get("resource")).get("service.name", ""))
        except _UNREADABLE:
            continue
        for of_scope in _items(of_resource, "scopeSpans"):
            for span in _items(of_scope, "spans"):
                try:
                    yield _span(span, service)
                except _UNREADABLE:
                    continue


_UNREADABLE = (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError)


def _items(holder: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = holder.get(name)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _span(span: dict[str, Any], service: str) -> Span:
    status = span.get("status") or {}
    return Span(
        trace_id=str(span["traceId"]),
        span_id=str(span["spanId"]),
        parent_id=str(span.get("parentSpanId") or ""),
        name=str(span["name"]),
        service=service,
        began=int(span["startTimeUnixNano"]) / 1e9,
        ended=int(span["endTimeUnixNano"]) / 1e9,
        attributes=_attributes(span),
        events=[
            Event(int(event["timeUnixNano"]) / 1e9, str(event["name"]), _attributes(event))
            for event in span.get("events") or ()
        ],
        error=str(status.get("message", "")) if status.get("code") in (2, "STATUS_CODE_ERROR") else None,
    )


def _attributes(holder: Any) -> dict[str, Any]:
    return {item["key"]: _value(item.get("value") or {}) for item in (holder or {}).get("attributes") or ()}


def _value(value: dict[str, Any]) -> Any:
    kind, content = next(iter(value.items()), ("", None))
    if content is None:
        return None
    if kind == "intValue":
        return int(content)
    if kind == "arrayValue":
        return [_value(item) for item in content.get("values") or ()]
    return content
