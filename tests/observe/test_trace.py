"""`tidewright trace`: from files and tracing backends to a timeline in the terminal and as a page."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner

from tidewright.launch.cli import main
from tidewright.observe.records import spans_of

TRACE, OTHER = "ab" * 16, "cd" * 16
BEGAN = 1_800_000_000_000_000_000  # nanoseconds
ATTEMPT = {"tidewright.replica": "10.0.0.1:8001", "tidewright.outcome": "stub_died"}


def otlp(name: str, own: str, parent: str, began: int, ended: int, attributes: dict[str, Any], error: str = "") -> str:
    """A line as OpenTelemetry's file exporters write it; times in milliseconds."""
    made = [
        {"key": key, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}
        for key, value in attributes.items()
    ]
    one = {
        "traceId": TRACE,
        "spanId": own,
        "parentSpanId": parent,
        "name": name,
        "startTimeUnixNano": str(BEGAN + began * 10**6),
        "endTimeUnixNano": str(BEGAN + ended * 10**6),
        "attributes": made,
        "events": [{"name": "first_token", "timeUnixNano": str(BEGAN + ended * 10**6)}] if name == "stream" else [],
        "status": {"code": 2, "message": error} if error else {},
    }
    about = {"attributes": [{"key": "service.name", "value": {"stringValue": "tidewright-gateway"}}]}
    return json.dumps({"resourceSpans": [{"resource": about, "scopeSpans": [{"spans": [one]}]}]}) + "\n"


SPANS = [
    otlp(
        "POST /v1/completions", "1" * 16, "", 0, 1000, {"tidewright.request_id": "req-1", "tidewright.key_id": "team"}
    ),
    otlp("attempt", "2" * 16, "1" * 16, 100, 400, ATTEMPT, error="stub_died"),
    otlp("stream", "3" * 16, "1" * 16, 500, 1000, {}),
]
LINES = [
    {"process": "decoder", "event": "request_received", "message": "taken", "request_id": "req-1-0"},
    {"process": "gateway", "event": "attempt_failed", "message": "it died", "request_id": "req-1-0", "trace_id": TRACE},
    {"process": "gateway", "event": "note", "message": "of another", "request_id": "req-10", "trace_id": OTHER},
    {
        "process": "gateway",
        "event": "request",
        "message": "done",
        "request_id": "req-1",
        "trace_id": TRACE,
        "status": 200,
    },
    {"process": "gateway", "event": "note", "message": "of the trace", "trace_id": TRACE},
]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Spans, and log lines with what a full disk leaves of some."""
    spans, log = tmp_path / "spans.jsonl", tmp_path / "gateway.log.gz"
    spans.write_text("".join(SPANS) + SPANS[0][:200] + "\n[1]\n" + f'{{"resourceSpans": [{{"x": "{TRACE}"}}]}}\n')
    with gzip.open(log, "wt") as file:
        for number, line in enumerate(LINES):
            file.write(json.dumps({"time": f"2027-01-15T08:00:00.{number}00Z", "level": "warning", **line}) + "\n")
        file.write('{"time": "never", "request_id": "req-1"}\nreq-1 {"time"\n')
    return [str(spans), str(log)]


def trace(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["trace", *arguments], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def test_a_requests_spans_and_lines_make_one_timeline(files: list[str]) -> None:
    code, text = trace("req-1", *files)
    assert code == 0, text
    for part in (
        "POST /v1/completions",
        "stub_died at 10.0.0.1:8001",
        "request_received taken",
        "it died",
        "first_token",
    ):
        assert part in text
    assert "of another" not in text
    assert "of the trace" in text
    assert text.index("request_received") < text.index("it died", text.index("request_received"))
    assert "stream 50%, attempt 30%, POST /v1/completions 20%" in text


@pytest.fixture
def used_twice(tmp_path: Path) -> list[str]:
    """Two requests with one X-Request-Id, the second an hour later, and a line of each that names no trace."""
    later = json.loads(SPANS[0])
    (span,) = later["resourceSpans"][0]["scopeSpans"][0]["spans"]
    span |= {"traceId": OTHER, "name": "POST /v1/chat/completions"}
    span |= {name: str(int(span[name]) + 3600 * 10**9) for name in ("startTimeUnixNano", "endTimeUnixNano")}
    spans, log = tmp_path / "spans.jsonl", tmp_path / "gateway.log"
    spans.write_text(SPANS[0] + json.dumps(later) + "\n")
    lines = [
        {
            "time": f"2027-01-15T0{hour}:00:00.500Z",
            "event": "request_received",
            "request_id": "req-1-0",
            "message": word,
        }
        for hour, word in ((8, "alpha"), (9, "beta"))
    ]
    lines.append({"time": "2027-01-15T09:00:02.000Z", "event": "note", "message": "late", "trace_id": OTHER})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(spans), str(log)]


def test_requests_with_one_id_are_shown_one_by_one_the_newest_first(used_twice: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, text = trace("req-1", *used_twice, "--html", str(page))
    assert code == 0
    assert text.startswith("2 requests have this id; the newest comes first")
    newest, _, oldest = text.partition(f"Trace {TRACE}")
    assert f"Trace {OTHER}" in newest
    assert oldest
    for part, own, others in (
        (newest, ["POST /v1/chat/completions", "beta", "late"], ["POST /v1/completions", "alpha"]),
        (oldest, ["POST /v1/completions", "alpha"], ["POST /v1/chat/completions", "beta", "late"]),
    ):
        assert all(word in part for word in own), part
        assert not any(word in part for word in others), part
        assert "1000.0 ms" in part  # not an hour
    html = page.read_text()
    assert html.index(f"Trace {OTHER}") < html.index("beta") < html.index(f"Trace {TRACE}") < html.index("alpha")
    code, text = trace(OTHER, *used_twice)
    assert code == 0
    assert "requests have this id" not in text
    assert "alpha" not in text


def test_more_requests_of_an_id_than_are_shown(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    lines = (
        {
            "time": f"2027-01-15T08:{number:02}:00Z",
            "message": f"no {number:02}",
            "request_id": "r",
            "trace_id": f"{number:032}",
        }
        for number in range(30)
    )
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, text = trace("r", str(log))
    assert code == 0
    assert "30 requests have this id, of which the 10 newest are shown" in text
    assert text.count("Trace 0") == 10
    assert text.index("no 29") < text.index("no 20")
    assert "no 19" not in text


@pytest.mark.parametrize("is_zipped", [False, True])
def test_standard_input_is_a_source(files: list[str], is_zipped: bool) -> None:
    with gzip.open(files[1], "rb") as log:
        text = log.read()
    given = gzip.compress(text) if is_zipped else text
    done = CliRunner().invoke(main, ["trace", "req-1", files[0], "-"], env={"COLUMNS": "200"}, input=given)
    assert done.exit_code == 0, done.output
    for part in ("POST /v1/completions", "it died", "of the trace"):
        assert part in done.output
    done = CliRunner().invoke(main, ["trace", "req-1", "-"], input=b"")
    assert "nothing of req-1 in -" in done.output


def test_the_trace_shows_the_same(files: list[str]) -> None:
    code, text = trace(TRACE.upper(), *files)
    assert code == 0
    assert "POST /v1/completions" in text
    assert "of the trace" in text
    assert "of another" not in text


def test_lines_alone_make_a_timeline(files: list[str]) -> None:
    code, text = trace("req-1", files[1])
    assert code == 0
    assert "status" in text
    assert "it died" in text


def test_the_page_has_all_and_runs_nothing(files: list[str], tmp_path: Path) -> None:
    with open(files[0], "a") as file:
        file.write(otlp("<script>alert(1)</script>", "4" * 16, "1" * 16, 600, 700, {}))
    page = tmp_path / "page.html"
    code, text = trace("req-1", *files, "--html", str(page))
    assert code == 0, text
    html = page.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "stub_died at 10.0.0.1:8001" in html
    assert 'class="failed"' in html
    assert "it died" in html


def test_what_is_not_there_or_can_not_be_read_is_said(files: list[str], tmp_path: Path) -> None:
    assert "nothing of req-2" in trace("req-2", *files)[1]
    assert "No such file" in trace("req-1", str(tmp_path / "none"))[1]
    assert "Is a directory" in trace("req-1", str(tmp_path))[1]
    broken = tmp_path / "x.gz"
    broken.write_bytes(b"no gzip")
    assert "x.gz" in trace("req-1", str(broken))[1]
    for bad in ("", "x" * 161, "é"):
        assert trace(bad, *files)[0] == 2
    code, text = trace("req-1", *files, "--html", str(tmp_path / "no" / "page.html"))
    assert code == 1
    assert "No such file" in text


@contextmanager
def server(answers: dict[str, Any]) -> Iterator[str]:
    """Answers paths with JSON, others with a page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            found = answers.get(url.path)
            if callable(found):
                found = found({key: values[0] for key, values in parse_qs(url.query).items()})
            body = b"<html>" if found is None else json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if found is None else "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


def jaeger_trace() -> dict[str, Any]:
    """As its documentation has the JSON of the UI."""
    root = {
        "traceID": TRACE,
        "spanID": "1" * 16,
        "operationName": "POST /v1/completions",
        "references": [],
        "startTime": BEGAN // 1000,
        "duration": 1_000_000,
        "tags": [{"key": "tidewright.request_id", "type": "string", "value": "req-1"}],
        "logs": [{"timestamp": BEGAN // 1000, "fields": [{"key": "event", "type": "string", "value": "settled"}]}],
        "processID": "p1",
    }
    child = {
        **root,
        "spanID": "2" * 16,
        "operationName": "attempt",
        "references": [{"refType": "CHILD_OF", "traceID": TRACE, "spanID": "1" * 16}],
        "duration": 400_000,
        "tags": [
            {"key": "tidewright.replica", "type": "string", "value": "10.0.0.1:8001"},
            {"key": "tidewright.outcome", "type": "string", "value": "stalled"},
            {"key": "error", "type": "bool", "value": True},
        ],
    }
    return {"data": [{"traceID": TRACE, "spans": [root, child], "processes": {"p1": {"serviceName": "gateway"}}}]}


def test_jaeger_is_asked_by_trace_and_by_request(files: list[str]) -> None:
    asked: list[dict[str, str]] = []

    def find(parameters: dict[str, str]) -> dict[str, Any]:
        asked.append(parameters)
        return jaeger_trace()

    answers = {"/api/services": {"data": ["gateway"]}, f"/api/traces/{TRACE}": jaeger_trace(), "/api/traces": find}
    with server(answers) as url:
        by_trace, by_request = trace(TRACE, url), trace("req-1", url, files[1])
    for code, text in (by_trace, by_request):
        assert code == 0, text
        assert "stalled at 10.0.0.1:8001" in text
        assert "settled" in text
        assert "gateway" in text
    assert "it died" in by_request[1]
    assert json.loads(asked[0]["tags"]) == {"tidewright.request_id": "req-1"}


def test_phoenix_is_asked_page_by_page() -> None:
    """As arize-phoenix 12 answers."""
    times = {"start_time": "2027-01-15T08:00:00.100000+00:00", "end_time": "2027-01-15T08:00:00.500000+00:00"}
    root = {
        "name": "POST /v1/completions",
        "context": {"trace_id": TRACE, "span_id": "1" * 16},
        "parent_id": None,
        **times,
        "status_code": "UNSET",
        "status_message": "",
        "attributes": {"tidewright.request_id": "req-1"},
        "events": [{"name": "settled", "timestamp": times["end_time"], "attributes": {"a": 1}}],
    }
    child = {
        **root,
        "name": "attempt",
        "context": {"trace_id": TRACE, "span_id": "2" * 16},
        "parent_id": "1" * 16,
        "status_code": "ERROR",
        "status_message": "gone",
        "attributes": ATTEMPT,
    }

    def spans(parameters: dict[str, str]) -> dict[str, Any]:
        first = {"data": [root], "next_cursor": "next"}
        return {"data": [child], "next_cursor": None} if parameters.get("cursor") == "next" else first

    with server({"/v1/projects/default/spans": spans}) as url:
        for wanted in (TRACE, "req-1"):
            code, text = trace(wanted, url)
            assert code == 0, text
            assert "stub_died at 10.0.0.1:8001" in text
            assert "gone" in text
        assert "nothing of req-3" in trace("req-3", url)[1]


def test_other_servers_are_told_from_backends() -> None:
    with server({}) as url:
        assert "does not answer as Jaeger or Phoenix do" in trace(TRACE, url)[1]
    assert "can't be asked" in trace(TRACE, "http://127.0.0.1:1")[1]
    for url in ("ftp://x", "http://[bad"):
        assert "neither a file nor the address" in trace(TRACE, url)[1]


@pytest.mark.parametrize(
    "spans",
    [
        1,
        [1],
        [{"scopeSpans": 1}],
        [{"resource": 1, "scopeSpans": [{"spans": [{}]}]}],
        [{"scopeSpans": [{"spans": 1}, {"spans": [1, {}]}]}],
        [{"scopeSpans": [{"spans": [{"traceId": "1", "spanId": "1", "name": "", "startTimeUnixNano": 10**400}]}]}],
    ],
)
def test_lines_of_another_shape_have_no_spans(spans: object) -> None:
    assert list(spans_of({"resourceSpans": spans})) == []
