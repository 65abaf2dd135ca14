"""A receiver of OTLP over HTTP, protobuf as the gateway sends it and JSON as Triton does, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PATIENCE = 30.0  # seconds


@dataclass
class ReceivedSpan:
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: int
    began: int
    ended: int
    attributes: dict[str, Any]
    events: list[str]
    failed: bool
    message: str


@dataclass
class Traces:
    spans: list[ReceivedSpan] = field(default_factory=list)

    def of(self, trace_id: str) -> list[ReceivedSpan]:
        return [span for span in self.spans if span.trace_id == trace_id]


class OtlpReceiver:
    """`answer` is called for each request, and may sleep, or give another status than 200."""

    def __init__(self) -> None:
        self.traces, self.requests = Traces(), 0
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[], int] = lambda: 200
        self._changed = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests += 1
                receiver.headers.append({name.lower(): value for name, value in self.headers.items()})
                status = receiver.answer()
                if status == 200:
                    receiver._take(body, self.headers["Content-Type"])
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> OtlpReceiver:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, body: bytes, kind: str) -> None:
        spans = spans_in_json(body) if "json" in kind else spans_of(ExportTraceServiceRequest.FromString(body))
        with self._changed:
            self.traces.spans += spans
            self._changed.notify_all()

    def wait(self, reached: Callable[[Traces], Any]) -> Any:
        """What `reached` returns, as soon as that is true."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while not (found := reached(self.traces)):
                left = deadline - time.monotonic()
                assert left > 0, self.traces.spans
                self._changed.wait(left)
            return found

    def trace(self, trace_id: str, *names: str) -> list[ReceivedSpan]:
        """All spans of a trace, once these are there."""

        def reached(traces: Traces) -> list[ReceivedSpan] | None:
            spans = traces.of(trace_id)
            return spans if set(names) <= {span.name for span in spans} else None

        found: list[ReceivedSpan] = self.wait(reached)
        return found


def spans_in_json(body: bytes) -> list[ReceivedSpan]:
    """OTLP's JSON has ids in hexadecimal digits, where protobuf's own has base64."""
    import base64
    import json

    request = json.loads(body)
    for resource in request["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                for name in ("traceId", "spanId", "parentSpanId"):
                    span[name] = base64.b64encode(bytes.fromhex(span.get(name, ""))).decode()
    return spans_of(json_format.ParseDict(request, ExportTraceServiceRequest(), ignore_unknown_fields=True))


def spans_of(request: ExportTraceServiceRequest) -> list[ReceivedSpan]:
    return [
        ReceivedSpan(
            attributes_of(resource.resource.attributes).get("service.name", ""),
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.name,
            span.kind,
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            attributes_of(span.attributes),
            [event.name for event in span.events],
            span.status.code == 2,
            span.status.message,
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def attributes_of(pairs: Any) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind) if kind else None
        found[pair.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found
