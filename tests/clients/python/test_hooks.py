"""Hooks see each call once; OtelHooks make a span of it, and the gateway is told of that span."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from helpers.conformance import ScriptedVectors
from tidewright_client import Answer, AsyncClient, CallInfo, Client, Hooks, InvalidRequest, TidewrightError, Unavailable
from tidewright_client.otel import OtelHooks

CHAT = [{"role": "user", "content": "Hi"}]


class Recorder(Hooks):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_request(self, call: CallInfo) -> None:
        call.headers["X-Mine"] = "yes"
        self.seen.append(("request", call.operation, call.model, call.is_stream))

    def on_retry(self, call: CallInfo, error: TidewrightError, wait: float) -> None:
        self.seen.append(("retry", error.status, 0 < wait <= 1))

    def on_first_token(self, call: CallInfo) -> None:
        self.seen.append("first token")

    def on_end(self, call: CallInfo, answer: Answer | None, error: TidewrightError | None) -> None:
        self.seen.append(("end", answer.text if answer else None, type(error).__name__, call.retries))


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedVectors]:
    with ScriptedVectors() as running:
        yield running


def test_hooks_see_a_call_from_its_request_to_its_end(scripted: ScriptedVectors) -> None:
    hooks = Recorder()
    with Client(scripted.begin("retry_with_backoff"), model="m", hooks=hooks) as client:
        list(client.stream_chat(CHAT))
    request = ("request", "chat", "m", True)
    assert hooks.seen == [request, *[("retry", 503, True)] * 2, "first token", ("end", "Hello", "NoneType", 2)]


@pytest.mark.parametrize(
    ("vector", "end"),
    [
        ("whole_answer", ("end", "Hello", "NoneType", 0)),
        ("another_shape", ("end", None, "UnexpectedAnswer", 0)),
        ("error_400_invalid_value", ("end", None, "InvalidRequest", 0)),
        ("not_the_gateway", ("end", None, "UnexpectedAnswer", 0)),
        ("too_big_answer", ("end", None, "UnexpectedAnswer", 0)),
    ],
)
def test_a_whole_answer_ends_once_however_it_ends(scripted: ScriptedVectors, vector: str, end: Any) -> None:
    hooks = Recorder()

    async def in_a_loop(url: str) -> None:
        async with AsyncClient(url, model="m", max_answer_bytes=10**6, hooks=hooks) as client:
            await client.chat(CHAT)

    url = scripted.begin(vector)
    for call in (Client(url, model="m", max_answer_bytes=10**6, hooks=hooks).chat, None):
        with contextlib.suppress(TidewrightError):
            call(CHAT) if call else asyncio.run(in_a_loop(url))
        assert hooks.seen == [("request", "chat", "m", False), end]
        hooks.seen.clear()


@pytest.mark.parametrize(
    ("vector", "text", "error"),
    [("error_in_a_stream", "Hello", "Unavailable"), ("no_retry_after_the_first_byte", "Hel", "Interrupted")],
)
def test_a_stream_that_fails_ends_with_its_error(scripted: ScriptedVectors, vector: str, text: str, error: str) -> None:
    hooks = Recorder()
    with Client(scripted.begin(vector), model="m", hooks=hooks) as client:
        with pytest.raises(TidewrightError):
            list(client.stream_chat(CHAT))
    assert hooks.seen[1:] == ["first token", ("end", text, error, 0)]


def test_a_stream_that_is_closed_or_dropped_ends_too(scripted: ScriptedVectors) -> None:
    for leave in ("close", "drop", "never open"):
        hooks, base_url = Recorder(), scripted.begin("cancel")
        with Client(base_url, model="m", hooks=hooks) as client:
            stream = client.stream_chat(CHAT)
            if leave != "never open":
                next(stream)
            if leave == "drop":
                del stream
            else:
                stream.close()
        assert [one for one in hooks.seen if one[0] == "end"] == [
            ("end", None if leave == "never open" else "a", "NoneType", 0)
        ]
        if leave != "never open":
            assert scripted.faults(base_url) == []


def test_a_hook_that_fails_costs_no_answer(scripted: ScriptedVectors, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Hooks):
        def on_request(self, call: CallInfo) -> None:
            raise ValueError("broken")

    with Client(scripted.begin("whole_answer"), model="m", hooks=Broken()) as client:
        assert client.chat(CHAT).text == "Hello"
    assert "a hook failed" in caplog.text


@pytest.fixture
def spans() -> tuple[OtelHooks, InMemorySpanExporter]:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OtelHooks(provider), exporter


def test_a_span_is_made_of_a_call(
    scripted: ScriptedVectors, spans: tuple[OtelHooks, InMemorySpanExporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks, exporter = spans
    sent: list[str] = []
    begun = hooks.on_request
    monkeypatch.setattr(hooks, "on_request", lambda call: (begun(call), sent.append(call.headers["traceparent"])))
    with Client(scripted.begin("retry_with_backoff"), model="m", hooks=hooks) as client:
        list(client.stream_chat(CHAT))
    (span,) = exporter.get_finished_spans()
    assert span.name == "chat m"
    (parent,) = sent
    assert parent.startswith(f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-")
    assert [event.name for event in span.events] == ["retry", "retry", "first_token"]
    assert span.attributes is not None
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "m",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "http.request.resend_count": 2,
    }
    assert expected.items() <= dict(span.attributes).items()
    assert span.status.is_ok


def test_a_span_of_a_failure_says_so(scripted: ScriptedVectors, spans: tuple[OtelHooks, InMemorySpanExporter]) -> None:
    hooks, exporter = spans
    with Client(scripted.begin("error_400_invalid_value"), model="m", hooks=hooks) as client:
        with pytest.raises(InvalidRequest):
            client.chat(CHAT)
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["error.type"] == "invalid_value"


def test_health_does_not_wait_for_better_times(scripted: ScriptedVectors) -> None:
    hooks = Recorder()
    with Client(scripted.begin("retries_end"), hooks=hooks) as client:
        with pytest.raises(Unavailable):
            client.health()
    assert hooks.seen == [("request", "health", None, False), ("end", None, "Unavailable", 0)]
