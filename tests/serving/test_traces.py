"""One trace over a real gateway, Triton, bridge and engine; and requests that come to Triton without a gateway."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.gateway import RunningGateway
from helpers.otlp import OtlpReceiver, ReceivedSpan
from helpers.processes import child, stub_of
from helpers.triton import RunningServer
from helpers.upstream import untraced
from tidewright.tracing.catalogue import ATTRIBUTES, EVENTS, SPANS

PARENT = "00f067aa0ba902b7"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ENGINE = {"bridge", "engine.queue", "engine.prefill", "engine.decode"}
SKEW = 2_000_000  # nanoseconds that the clocks of two processes, read one after the other, may differ
numbers = count(int(time.time()))


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as running:
        yield running


@pytest.fixture(scope="module")
def two(model_dir: Path, receiver: OtlpReceiver) -> Iterator[list[RunningServer]]:
    options = {"kv_cache_memory": "64MiB", "streaming_share": 1, "otlp_endpoint": receiver.url, "gateway_port": 0}
    with RunningServer(model_dir, **options) as one, RunningServer(model_dir, **options) as other:
        yield [one, other]


@pytest.fixture(scope="module")
def gateway(model_dir: Path, two: list[RunningServer], receiver: OtlpReceiver) -> Iterator[RunningGateway]:
    options = {
        "otlp_endpoint": receiver.url,
        "trace_callers": True,
        "trace_slow": 3600,
        "routing": "round_robin",
        "wait_for_replica": 10,
    }
    options |= {
        "patience": 30,
        "stall_timeout": 60,
    }  # a stream stays where its engine died, however long the next takes
    with RunningGateway(model_dir, *two, **options) as running:
        yield running


def headers(sampled: bool) -> tuple[str, dict[str, str]]:
    trace_id = f"{next(numbers):032x}"
    return trace_id, {"traceparent": f"00-{trace_id}-{PARENT}-0{sampled:d}"}


def ask_until_triton_traces(gateway: RunningGateway, receiver: OtlpReceiver, path: str, body: dict[str, Any]) -> str:
    """The id of the trace, which has all of the gateway's and the engine's spans."""
    for _ in range(5):
        trace_id, sent = headers(sampled=True)
        assert gateway.post(path, body, headers=sent).headers["X-Trace-Id"] == trace_id
        if not untraced(receiver.trace(trace_id, f"POST {path}", "bridge")):
            return trace_id
    raise AssertionError("Triton traces nothing")


def ours(spans: list[ReceivedSpan], name: str) -> list[ReceivedSpan]:
    found = [span for span in spans if span.name == name and span.service != "tidewright-triton"]
    return sorted(found, key=lambda span: span.began)


def check(spans: list[ReceivedSpan]) -> None:
    """What holds for each whole trace: nothing hangs in the air, nothing begins before what it is part of."""
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    assert [span.parent_id for span in spans if span.parent_id not in by_id] == [PARENT]
    for span in spans:
        assert span.began <= span.ended, span
        if parent := by_id.get(span.parent_id):
            assert span.began >= parent.began - SKEW, (span, parent)
        if span.service != "tidewright-triton" and span.kind != 2:
            assert span.name in SPANS, span
            assert span.attributes.keys() <= ATTRIBUTES.keys(), span
            assert set(span.events) <= EVENTS.keys(), span


def above(span: ReceivedSpan, spans: list[ReceivedSpan]) -> list[str]:
    """Services and names up to the root."""
    by_id, found = {one.span_id: one for one in spans}, []
    while parent := by_id.get(span.parent_id):
        found.append(parent.name)
        span = parent
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_one_trace_over_all_of_them(
    gateway: RunningGateway, pair: list[RunningServer], receiver: OtlpReceiver, stream: bool
) -> None:
    body = {"messages": [{"role": "user", "content": f"Count to nine, {stream}"}], "max_tokens": 8, "stream": stream}
    body |= {"ignore_eos": True}  # at a temperature an answer may end at any token
    trace_id = ask_until_triton_traces(gateway, receiver, CHAT, body)
    names = {f"POST {CHAT}", "admit", "tokenize", "queue", "attempt", "stream", *ENGINE}
    spans = receiver.trace(trace_id, *names, "InferRequest", "decoder", "compute")
    check(spans)
    (bridge,), (prefill,), (decode,) = (ours(spans, name) for name in ("bridge", "engine.prefill", "engine.decode"))
    assert above(bridge, spans) == ["decoder", "InferRequest", "attempt", f"POST {CHAT}"]
    assert {span.parent_id for span in spans if span.name.startswith("engine.")} == {bridge.span_id}
    assert bridge.events == ["validated", "sent_to_engine"]
    assert (prefill.attributes["tidewright.prefill.chunks"], decode.events) == (1, ["first_token"])
    assert decode.attributes["gen_ai.usage.output_tokens"] == 8
    assert prefill.ended == decode.began


def test_each_of_several_choices_has_its_own_bridge_and_engine(
    gateway: RunningGateway, pair: list[RunningServer], receiver: OtlpReceiver
) -> None:
    body = {"prompt": "The sea", "max_tokens": 4, "n": 3}
    trace_id = ask_until_triton_traces(gateway, receiver, COMPLETIONS, body)
    spans = receiver.wait(lambda traces: (found := traces.of(trace_id)) and len(ours_of_triton(found)) == 9 and found)
    check(spans)
    assert [span.attributes["tidewright.choice"] for span in sorted_by_choice(ours(spans, "attempt"))] == [0, 1, 2]
    for attempt in ours(spans, "attempt"):
        below = [bridge for bridge in ours(spans, "bridge") if above(bridge, spans)[2] == "attempt"]
        mine = [bridge for bridge in below if attempt.span_id in ids_above(bridge, spans)]
        assert len(mine) == 1


def ours_of_triton(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
    return [span for span in spans if span.service == "tidewright-triton"]


def sorted_by_choice(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
    return sorted(spans, key=lambda span: span.attributes["tidewright.choice"])


def ids_above(span: ReceivedSpan, spans: list[ReceivedSpan]) -> set[str]:
    by_id, found = {one.span_id: one for one in spans}, set()
    while parent := by_id.get(span.parent_id):
        found.add(parent.span_id)
        span = parent
    return found


def begin(gateway: RunningGateway, sent: dict[str, str], **body: Any) -> Any:
    body = {"model": "smollm2-135m", "prompt": "Once", "stream": True, "ignore_eos": True, "seed": 1, **body}
    return gateway.http.stream("POST", COMPLETIONS, json=body, headers=sent)


def busy(pair: list[RunningServer]) -> RunningServer:
    """The one that has the request; its metrics lag."""
    deadline = time.monotonic() + 10
    while len(found := [server for server in pair if server.metric("requests_active")]) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found[0]


@pytest.mark.parametrize("blow", ["engine", "stub"])
def test_a_death_in_the_middle_shows_whether_sampled_or_not(
    gateway: RunningGateway, pair: list[RunningServer], receiver: OtlpReceiver, blow: str
) -> None:
    """Of an engine: one attempt, with a replay. Of a stub: two attempts, of which the second tells of its engine."""
    trace_id, sent = headers(sampled=False)
    with begin(gateway, sent, max_tokens=300) as answer:
        lines = answer.iter_lines()
        for _ in range(10):
            next(lines)
        victim = busy(pair)
        if blow == "engine":
            os.kill(child(victim.triton.pid or 0, "tidewright.engine").pid, signal.SIGKILL)
        else:
            stub_of(victim, "decoder").kill()
        assert "data: [DONE]" in list(lines)
    if blow == "engine":  # it is neither slow nor an error nor a failover
        again, sent = headers(sampled=True)
        gateway.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1}, headers=sent)
        receiver.trace(again, f"POST {COMPLETIONS}")
        assert not receiver.traces.of(trace_id)
        return
    spans = receiver.trace(trace_id, f"POST {COMPLETIONS}")
    check(spans)
    failed, well = ours(spans, "attempt")
    assert (failed.failed, well.failed) == (True, False)
    before = well.attributes["tidewright.tokens_before"]
    assert before == failed.attributes["gen_ai.usage.output_tokens"] > 0
    assert well.attributes["gen_ai.usage.output_tokens"] == 300 - before
    (bridge,) = ours(spans, "bridge")
    assert bridge.parent_id == well.span_id  # Triton was not told
    assert not ours_of_triton(spans)


def test_a_replay_is_an_event_of_the_decode(
    gateway: RunningGateway, pair: list[RunningServer], receiver: OtlpReceiver
) -> None:
    trace_id, sent = headers(sampled=True)
    with begin(gateway, sent, max_tokens=300) as answer:
        lines = answer.iter_lines()
        for _ in range(10):
            next(lines)
        victim = busy(pair)
        child(victim.triton.pid or 0, "tidewright.engine").kill()
        list(lines)
    spans = receiver.trace(trace_id, f"POST {COMPLETIONS}")
    (decode,) = ours(spans, "engine.decode")
    assert decode.events == ["first_token", "replayed"]
    assert len(ours(spans, "attempt")) == 1


def test_one_whose_client_leaves(gateway: RunningGateway, pair: list[RunningServer], receiver: OtlpReceiver) -> None:
    trace_id, sent = headers(sampled=True)
    with begin(gateway, sent, max_tokens=1000) as answer:
        next(answer.iter_lines())
    spans = receiver.trace(trace_id, f"POST {COMPLETIONS}")
    (attempt,) = ours(spans, "attempt")
    assert attempt.attributes["tidewright.outcome"] == "cancelled"
    assert not ours(spans, "bridge")  # its account comes with a last response


@pytest.mark.parametrize("model", ["decoder", "failsafe", "generate"])
def test_without_a_gateway_the_bridge_exports_below_tritons_span(
    pair: list[RunningServer], receiver: OtlpReceiver, model: str
) -> None:
    trace_id, sent = headers(sampled=True)
    url = f"{pair[0].triton.http_url}/v2/models/{model}/generate"
    answer = httpx.post(url, json={"text_input": "Hi", "max_tokens": 3}, headers=sent, timeout=60, trust_env=False)
    assert answer.status_code == 200
    spans = receiver.trace(trace_id, "InferRequest", *ENGINE)
    check(spans)
    (bridge,) = ours(spans, "bridge")
    assert above(bridge, spans)[-1] == "InferRequest"
    assert pair[0].is_well()


def test_a_context_that_is_none_harms_nobody(pair: list[RunningServer]) -> None:
    for value in ("x", "0" * 10240, 5, True):
        body = {"text_input": "Hi", "max_tokens": 1, "traceparent": value}
        assert pair[0].post("decoder/generate", body).status_code == 200
        assert pair[0].post("generate/generate", body).status_code == 200
