"""Spans on their way out: to a collector that is well, gone, slow or full of errors, and to a file."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from helpers.otlp import OtlpReceiver, spans_in_json, spans_of
from tidewright.config import Settings
from tidewright.tracing import endpoint, exporter
from tidewright.tracing.endpoint import check_endpoint, open_endpoint, traces_url
from tidewright.tracing.environment import read_environment
from tidewright.tracing.exporter import Exporter, Pending
from tidewright.tracing.otlp import encode, request_of, to_json_lines
from tidewright.tracing.span import ENGINE, GATEWAY, Event, Kind, Span, Trace
from tidewright.tracing.trace_context import new_span_id
from tidewright_gateway.config import GatewaySettings

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Made(Pending):
    def __init__(self, num_spans: int = 2) -> None:
        self.trace_id, self.num_spans = TRACE, num_spans

    def spans(self) -> list[Span]:
        return [Span(f"span {number}", new_span_id(), "", 1.0, 2.0) for number in range(self.num_spans)]


@contextmanager
def running(url: str) -> Iterator[tuple[Exporter, Counter[str]]]:
    counts: Counter[str] = Counter()
    made = Exporter(url, lambda n: counts.update(exported=n), lambda why, n: counts.update({why: n}))
    made.start()
    yield made, counts
    made.stop(0.1)


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_arrive_with_headers_and_what_describes_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20secret, x-a=b")
    with OtlpReceiver() as receiver, running(receiver.url) as (made, counts):
        for _ in range(3):
            made.put(Made())
        made.stop(30)
        assert len(receiver.traces.spans) == counts["exported"] == 6
        assert receiver.headers[0]["authorization"] == "Bearer secret"
        assert receiver.headers[0]["content-type"] == "application/x-protobuf"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("OTEL_EXPORTER_OTLP_TIMEOUT", value) for value in ("10s", "-1", "0", "1.5", "99999999", "٣")),
        *(("OTEL_EXPORTER_OTLP_HEADERS", value) for value in ("secret", "=secret", "a b=secret", "a=b,secret")),
        *(("OTEL_EXPORTER_OTLP_HEADERS", value) for value in ("a=secret%0D%0Ax:y", "a=secret%FF", "a=" + "s" * 20_000)),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/such.pem"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", __file__),
        *(("OTEL_RESOURCE_ATTRIBUTES", value) for value in ("prod", "=x", "a=%FF")),
    ],
)
def test_a_variable_that_can_not_be_read_ends_the_start_by_its_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    for settings_class in (Settings, GatewaySettings):
        settings_class()  # nothing is exported
        with pytest.raises(ValidationError, match=variable) as refused:
            settings_class(otlp_endpoint="http://127.0.0.1:4318")
        assert "secret" not in refused.value.errors()[0]["msg"]


def test_variables_that_are_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", " 2500 ")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "a=b%20c, ,x-y=")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.version=1,x=%C3%BC")
    found = read_environment()
    assert (found.timeout, found.headers) == (2.5, {"a": "b c", "x-y": ""})
    assert found.resource == {"service.version": "1", "x": "ü"}
    for variable in ("TIMEOUT", "HEADERS"):
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{variable}", "")
    assert (read_environment().timeout, read_environment().headers) == (10.0, {})


def test_a_full_batch_does_not_wait_for_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "DELAY", 1000.0)
    with OtlpReceiver() as receiver, running(receiver.url) as (made, _):
        for _ in range(exporter.MAX_BATCH):
            made.put(Made())
        receiver.wait(lambda traces: len(traces.spans) == 2 * exporter.MAX_BATCH)


def test_nobody_waits_for_a_collector_that_hangs_and_what_is_too_much_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporter, "MAX_QUEUED", 10)
    monkeypatch.setattr(exporter, "DELAY", 0.01)
    go_on = threading.Event()
    with OtlpReceiver() as receiver, running(receiver.url) as (made, counts):
        receiver.answer = lambda: 200 if go_on.wait(30) else 500
        made.put(Made())
        until(lambda: receiver.requests == 1)  # and hangs
        for _ in range(30):
            made.put(Made())
        assert len(made._queue) == 10
        assert counts == {"queue_full": 40}
        go_on.set()
        receiver.wait(lambda traces: len(traces.spans) == 22)
        until(lambda: counts["exported"] == 22)


@pytest.mark.parametrize("status", [500, 400, 503, 0])
def test_what_a_collector_does_not_take_is_counted_and_the_next_is_tried(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(exporter, "DELAY", 0.01)
    with OtlpReceiver() as receiver:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = receiver.url if status else f"http://127.0.0.1:{closed.getsockname()[1]}"
        receiver.answer = lambda: status
        with running(url) as (made, counts):
            made.put(Made())
            until(lambda: counts["export_failed"] == 2)
            assert receiver.requests == {503: endpoint.TRIES, 0: 0}.get(status, 1)
            if status:
                receiver.answer = lambda: 200
                made.put(Made())
                until(lambda: counts["exported"] == 2)
            assert counts["export_failed"] == 2


def test_a_mistake_of_ours_costs_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "DELAY", 0.01)
    with OtlpReceiver() as receiver, running(receiver.url) as (made, counts):
        broken = Made()
        broken.spans = lambda: [Span("no id", "xyz", "", 1.0, 2.0)]  # type: ignore[method-assign]
        made.put(broken)
        until(lambda: counts["export_failed"] > 0)
        made.put(Made())
        until(lambda: counts["exported"] == 2)


def test_a_file_gets_a_line_for_each_span_and_may_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "DELAY", 0.01)
    file = tmp_path / "a b.jsonl"
    with running(f"file://{tmp_path}/a%20b.jsonl") as (made, counts):
        made.put(Made(3))
        until(lambda: counts["exported"] == 3)
        file.rename(tmp_path / "old")
        made.put(Made())
        until(lambda: counts["exported"] == 5)
    lines = file.read_bytes().splitlines()
    assert (len((tmp_path / "old").read_bytes().splitlines()), len(lines)) == (3, 2)
    (span,) = spans_in_json(lines[0])
    assert (span.trace_id, span.name, span.began, span.service) == (TRACE, "span 0", 10**9, GATEWAY)


def test_a_disk_that_is_full_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "DELAY", 0.01)
    with running("file:///dev/full") as (made, counts):
        made.put(Made())
        until(lambda: counts["export_failed"] == 2)


@pytest.mark.parametrize("wrong", ["here", "ftp://a", "http://", "file://host/x", "file:///", "localhost:4318"])
def test_what_is_no_endpoint_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="otlp_endpoint must be"):
        check_endpoint(wrong)


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file or directory"):
        open_endpoint(f"file://{tmp_path}/no/such")


def test_the_path_is_otlps_own_where_none_is_given() -> None:
    for given_url in ("http://a:1", "http://a:1/"):
        assert traces_url(given_url) == "http://a:1/v1/traces"
    assert traces_url("http://a:1/api/otlp") == "http://a:1/api/otlp"


numbers = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
values = st.text(max_size=5) | st.booleans() | numbers | st.lists(st.text())
attributes = st.dictionaries(st.text(min_size=1, max_size=5), values, max_size=4)
times = st.floats(1e9, 2e9)
spans = st.builds(
    Span,
    st.text(max_size=8),
    st.from_regex("[1-9a-f]{16}", fullmatch=True),
    st.just("") | st.from_regex("[1-9a-f]{16}", fullmatch=True),
    times,
    times,
    attributes,
    st.lists(st.builds(Event, st.text(), times, attributes), max_size=2),
    st.sampled_from(Kind),
    st.none() | st.text(),
    st.sampled_from([GATEWAY, ENGINE]),
)


@settings(max_examples=50)
@given(st.lists(spans, max_size=4))
def test_it_reads_as_opentelemetrys_own_encoder_writes_it(made: list[Span]) -> None:
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event as SdkEvent
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

    kinds = {Kind.INTERNAL: SpanKind.INTERNAL, Kind.SERVER: SpanKind.SERVER, Kind.CLIENT: SpanKind.CLIENT}

    def nanoseconds(seconds: float) -> int:
        return int(seconds * 1e9)

    def context(span_id: str) -> SpanContext:
        return SpanContext(int(TRACE, 16), int(span_id, 16), False, TraceFlags(1))

    theirs = [
        ReadableSpan(
            span.name,
            context(span.span_id),
            context(span.parent_id) if span.parent_id else None,
            Resource({"a": "b", "service.name": span.service}),
            span.attributes,
            [SdkEvent(event.name, event.attributes, nanoseconds(event.at)) for event in span.events],
            kind=kinds[span.kind],
            status=Status(StatusCode.UNSET) if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=nanoseconds(span.began),
            end_time=nanoseconds(span.ended),
        )
        for span in made
    ]
    expected = spans_of(encode_spans(theirs))
    ours = spans_of(ExportTraceServiceRequest.FromString(request_of([encode(Trace(TRACE, made))], {"a": "b"})))
    lines = to_json_lines([Trace(TRACE, made)], {"a": "b"}).splitlines()
    in_json = [span for line in lines for span in spans_in_json(line)]

    def in_order(found: list) -> list:
        return sorted(found, key=repr)

    assert in_order(ours) == in_order(expected)
    assert in_order(in_json) == in_order(expected)
    assert all(json.loads(line)["resourceSpans"] for line in lines)
