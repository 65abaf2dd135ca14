"""Triton's /metrics after a known set of requests: each counted once, no more and no less."""

from __future__ import annotations

import time

import pytest

from helpers.triton import RunningServer
from tidewright.bridge.metrics import METRICS
from tidewright.failsafe.metrics import METRICS as OF_FAILSAFE

GREEDY = {"temperature": 0, "ignore_eos": True}
HISTOGRAMS = [spec.name for spec in METRICS if spec.kind == "histogram"]

Samples = dict[tuple[str, str], float]


@pytest.fixture
def server(bf16_server: RunningServer) -> RunningServer:
    bf16_server.wait_idle()
    return bf16_server


def change(server: RunningServer, before: Samples, expected: dict[tuple[str, str], float]) -> Samples:
    """How much each series has grown once the expected ones have; they lag by up to a second."""
    deadline = time.monotonic() + 20
    while True:
        now = server.metrics()
        grown = {key: now[key] - before[key] for key in now}
        if {key: grown[key] for key in expected} == expected or time.monotonic() > deadline:
            time.sleep(0.6)  # a count that goes on growing would show
            now = server.metrics()
            grown = {key: now[key] - before[key] for key in now}
            assert {key: grown[key] for key in expected} == expected
            return grown
        time.sleep(0.1)


def finished(**reasons: int) -> dict[tuple[str, str], float]:
    """The expected growth of each reason's counter."""
    (spec,) = (spec for spec in METRICS if spec.name == "requests_finished_total")
    return {(spec.name, reason): reasons.get(reason, 0) for reason in spec.label_values}


def test_every_metric_is_there_from_the_start_under_its_type(server: RunningServer) -> None:
    names = {name for name, _ in server.metrics()}
    expected = {spec.name for spec in METRICS if spec.kind != "histogram"}
    expected |= {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
    expected |= {f"failsafe_{spec.name}" for spec in OF_FAILSAFE}
    assert names == expected


def test_a_known_set_of_requests_is_counted_exactly(server: RunningServer) -> None:
    before = server.metrics()
    began = time.monotonic()
    with server.stream() as stream:
        for number in range(5):
            stream.send(str(number), text_input="Once", stream=True, sampling_parameters={**GREEDY, "max_tokens": 6})
        stream.send("whole", text_input="Once", sampling_parameters={**GREEDY, "max_tokens": 4})
        generations = stream.finish()
    assert not any(generation.error for generation in generations.values())
    requests, tokens = 6, 5 * 6 + 4
    expected = finished(length=requests) | {
        ("generated_tokens_total", ""): tokens,
        ("prompt_tokens_total", ""): requests,
        ("time_to_first_token_seconds_count", ""): requests,
        ("request_queue_seconds_count", ""): requests,
        ("request_latency_seconds_count", ""): requests,
        ("inter_token_latency_seconds_count", ""): tokens - requests,
    }
    grown = change(server, before, expected)
    for name in HISTOGRAMS:
        buckets = [(float(le), value) for (of, le), value in grown.items() if of == f"{name}_bucket"]
        counts = [value for _, value in sorted(buckets)]
        assert counts == sorted(counts), name
        assert counts[-1] == grown[f"{name}_count", ""], name
        bounds = [bound for bound, _ in sorted(buckets)]
        assert bounds[-1] == float("inf")
        in_bucket = [high - low for high, low in zip(counts, [0, *counts], strict=False)]
        least = sum(n * low for n, low in zip(in_bucket, [0, *bounds], strict=False))
        most = sum(n * high for n, high in zip(in_bucket, bounds, strict=True) if n)
        assert least - 1e-6 <= grown[f"{name}_sum", ""] <= most + 1e-6, name
    first, further = grown["time_to_first_token_seconds_sum", ""], grown["inter_token_latency_seconds_sum", ""]
    # Each of these requests ends with its last token, so the parts make up the whole.
    assert grown["request_latency_seconds_sum", ""] == pytest.approx(first + further, rel=1e-3)
    assert 0 < first + further < requests * (time.monotonic() - began)
    assert grown["step_seconds_total", "send"] > 0


def test_every_kind_of_end_is_counted_once(server: RunningServer) -> None:
    before = server.metrics()
    with server.stream() as stream:
        options = {**GREEDY, "max_tokens": 8}
        stream.send("length", text_input="Once", sampling_parameters=options)
        stream.send("many", text_input="Once", sampling_parameters={**options, "n": 3})
        stream.send("stop", text_input="Count: one, two,", sampling_parameters={**options, "stop": [","]})
        stream.send("invalid", text_input="Once", sampling_parameters={"top_p": 7})
        stream.send("timeout", text_input="Once", sampling_parameters={"timeout": 0})
        stream.finish()
    doomed = server.stream()
    doomed.send("1", text_input="Once", stream=True, sampling_parameters={**GREEDY, "max_tokens": 2000})
    doomed.next()
    doomed.close(cancel=True)
    expected = finished(length=2, stop=1, invalid=1, timeout=1, cancelled=1)
    change(server, before, expected | {("request_latency_seconds_count", ""): 3})


def test_gauges_of_an_idle_server(server: RunningServer) -> None:
    now = server.metrics()
    assert now["engine_up", ""] == 1
    assert now["requests_active", ""] == now["requests_running", ""] == now["requests_waiting", ""] == 0
    assert now["kv_blocks_free", ""] == now["kv_blocks", ""] > 0
    assert now["kv_usage_ratio", ""] == 0
