"""A caller that hangs up: generation stops and every block is back in the pool."""

from __future__ import annotations

import time

import httpx
import pytest

from helpers.triton import RunningServer

LONG = {"temperature": 0, "max_tokens": 2000, "ignore_eos": True}
FAR_BELOW = 1000  # tokens of these; how many there are before the cancel arrives depends on how busy the machine is


def assert_generation_stops(server: RunningServer) -> None:
    """The engine's count of tokens stands still."""
    server.wait_idle()
    before = server.metric("generated_tokens_total")
    time.sleep(1)
    assert server.metric("generated_tokens_total") == before


def test_grpc_stream_cancel(bf16_server: RunningServer) -> None:
    start = bf16_server.metric("generated_tokens_total")
    stream = bf16_server.stream()
    stream.send("1", text_input="Once", stream=True, sampling_parameters=LONG)
    while not stream.generations["1"].token_ids:
        stream.next()
    stream.close(cancel=True)
    assert_generation_stops(bf16_server)
    assert bf16_server.metric("generated_tokens_total") - start < FAR_BELOW


def test_http_disconnect(bf16_server: RunningServer) -> None:
    start = bf16_server.metric("generated_tokens_total")
    url = f"{bf16_server.triton.http_url}/v2/models/decoder/generate_stream"
    body = {"text_input": "Once", "stream": True, **LONG}
    with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
        next(response.iter_lines())
    assert_generation_stops(bf16_server)
    assert bf16_server.metric("generated_tokens_total") - start < FAR_BELOW


def test_one_of_many_is_cancelled_and_the_others_go_on(bf16_server: RunningServer) -> None:
    options = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    doomed = bf16_server.stream()
    with bf16_server.stream() as stream:
        for number in range(4):
            stream.send(str(number), text_input="Once", stream=True, sampling_parameters=options)
        doomed.send("doomed", text_input="Once", stream=True, sampling_parameters=LONG)
        doomed.next()
        doomed.close(cancel=True)
        generations = stream.finish()
    assert all(len(generation.token_ids) == 30 and not generation.error for generation in generations.values())
    assert_generation_stops(bf16_server)


def test_requests_waiting_for_a_place_can_be_cancelled(bf16_server: RunningServer) -> None:
    stream = bf16_server.stream()
    for number in range(100):  # more than run at once
        stream.send(str(number), text_input="Once", stream=True, sampling_parameters=LONG)
    stream.next()
    stream.close(cancel=True)
    assert_generation_stops(bf16_server)


@pytest.mark.parametrize(
    ("called", "cancelled_at"),
    [
        ("generate_direct", "decoder"),
        ("failsafe", "failsafe"),
        ("generate", "failsafe"),
        ("generate", "decoder"),
    ],
)
def test_by_id_where_an_ensemble_carries_no_cancel(bf16_server: RunningServer, called: str, cancelled_at: str) -> None:
    start = bf16_server.metric("generated_tokens_total")
    with bf16_server.stream() as stream:
        for name in ("doomed", "other"):
            options = {**LONG, "max_tokens": 2000 if name == "doomed" else 30}
            stream.send(name, model=called, text_input="Once", stream=True, sampling_parameters=options)
        while not stream.generations["doomed"].token_ids:
            stream.next()
        answer = bf16_server.control("cancel:doomed", cancelled_at).json()
        assert answer.get("text_output") == "ok", answer
        generations = stream.finish()
    assert len(generations["other"].token_ids) == 30
    assert generations["other"].error is None
    assert str(generations["doomed"].error).endswith("cancelled by its id [cancelled]")
    assert_generation_stops(bf16_server)
    assert bf16_server.metric("generated_tokens_total") - start < FAR_BELOW
    assert bf16_server.metric("kv_blocks_free") == bf16_server.metric("kv_blocks")


def test_an_id_that_is_not_in_flight_or_none(bf16_server: RunningServer) -> None:
    answer = bf16_server.control("cancel:nobody")
    assert answer.status_code == 400
    assert "no request with the id 'nobody' is in flight" in answer.json()["error"]
    answer = bf16_server.control("cancel:")
    assert "must be followed by the id" in answer.json()["error"]
