"""The clients before the real Triton, with transformers' answers."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.byte_relay import ByteRelay
from helpers.both_clients import Clients
from helpers.needs import needs
from helpers.oracle import Oracle
from helpers.triton import RunningServer
from tidewright_client.errors import ConnectionFailed, Interrupted, InvalidRequest, NotFound, TidewrightError

GREEDY = {"temperature": 0, "max_tokens": 12}
LONG: Any = {"temperature": 0, "max_tokens": 3000, "ignore_eos": True}
PROMPT = "The lighthouse keeper climbed the stairs and"
CHAT = [{"role": "user", "content": "Name three fruits."}]
TIMEOUT = 60.0  # seconds


def until(what: Any) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("model", ["failsafe", "decoder"])
def test_texts_are_transformers_whole_and_streamed(
    clients: Clients, server: RunningServer, oracle: Oracle, model: str
) -> None:
    ids = oracle.ids(PROMPT)
    with clients(server.grpc_url) as client:
        expected = oracle.greedy(ids, 12, guess=client.generate(input_ids=ids, model=model, **GREEDY).token_ids)
        text = oracle.tokenizer.decode(expected)
        for given in ({"prompt": PROMPT}, {"input_ids": ids}):
            answer = client.generate(**given, model=model, **GREEDY)
            assert (answer.text, answer.token_ids, answer.finish_reason) == (text, expected, "length")
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
            assert answer.served_by == "decoder"
            stream = client.stream(**given, model=model, **GREEDY)
            pieces = list(stream)
            assert len(pieces) > 3
            assert "".join(piece.text for piece in pieces) == text
            assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
            assert stream.answer().outputs == answer.outputs
        templated = oracle.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        assert client.tokenize(messages=CHAT) == templated
        assert client.tokenize(PROMPT) == ids
        answer = client.generate(messages=CHAT, model=model, **GREEDY)
        assert answer.token_ids == oracle.greedy(templated, 12, guess=answer.token_ids)


def test_details_logprobs_and_several_outputs(clients: Clients, server: RunningServer) -> None:
    with clients(server.grpc_url) as client:
        for model in ("failsafe", "decoder"):
            stream = client.stream(
                PROMPT, model=model, details=True, logprobs=2, prompt_logprobs=0, n=3, seed=5, top_k=40
            )
            pieces = list(stream)
            answer = stream.answer()
            assert [one.finish_reason for one in answer.outputs] == ["length"] * 3
            assert len({one.text for one in answer.outputs}) > 1
            for index, output in enumerate(answer.outputs):
                assert "".join(piece.text for piece in pieces if piece.index == index) == output.text
                assert [next(iter(found)) for found in output.logprobs] == output.token_ids
                total = sum(next(iter(found.values())).logprob for found in output.logprobs)
                assert output.cumulative_logprob == pytest.approx(total, abs=1e-3)
            assert answer.prompt_logprobs[0] is None
            assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens
            assert answer.usage.completion_tokens == 48
        free = client.generate(PROMPT, **GREEDY)
        stopped = client.generate(PROMPT, details=True, stop=free.text[3:8], **GREEDY)
        assert (stopped.outputs[0].stop_reason, stopped.finish_reason) == (free.text[3:8], "stop")
        assert stopped.num_cached_tokens is not None


def test_many_streams_at_once_over_one_connection(clients: Clients, server: RunningServer, oracle: Oracle) -> None:
    prompts = [f"{PROMPT} {number}" for number in range(16)]
    with ByteRelay(server.settings.grpc_port) as relay, clients(f"127.0.0.1:{relay.port}") as client:
        streams = [client.stream(prompt, **GREEDY) for prompt in prompts]
        with ThreadPoolExecutor(16) as threads:
            texts = list(threads.map(lambda stream: "".join(piece.text for piece in stream), streams))
        chat = client.generate(messages=CHAT, **GREEDY)
        assert client.health()
        assert client.health("decoder")
        assert client.status().max_model_len == 4096
        assert relay.connections == 1
    for prompt, stream, text in zip(prompts, streams, texts, strict=True):
        ids = oracle.greedy(oracle.ids(prompt), 12, guess=stream.answer().token_ids)
        assert text == oracle.tokenizer.decode(ids, skip_special_tokens=True)
    assert chat.text


@pytest.mark.parametrize("model", ["failsafe", "decoder"])
def test_who_leaves_frees_the_engine(clients: Clients, server: RunningServer, model: str) -> None:
    server.wait_idle()
    before = server.metric("generated_tokens_total")
    with clients(server.grpc_url) as client:
        closed = client.stream(PROMPT, model=model, **LONG)
        next(closed)
        closed.close()
        named = client.stream(PROMPT, model=model, request_id=f"mine-{time.time_ns()}", **LONG)
        next(named)
        with clients(server.grpc_url) as other:
            assert other.cancel(named.request_id, model)
            assert not other.cancel("nobody", model)
        with pytest.raises(Interrupted, match="cancelled by its id") as cut:
            list(named)
        assert cut.value.code == "cancelled"
        assert cut.value.partial.token_ids
        server.wait_idle()
        # A step computes all that run, and each of the two ran for some steps.
        assert server.metric("generated_tokens_total") - before < LONG["max_tokens"] / 4
        assert client.generate(PROMPT, model=model, **GREEDY).finish_reason == "length"  # the stream is fine


def test_a_reader_who_pauses_holds_up_nobody_and_gets_all(clients: Clients, server: RunningServer) -> None:
    sampling = {**GREEDY, "max_tokens": 60, "ignore_eos": True}
    with clients(server.grpc_url) as client:
        slow = client.stream(PROMPT, model="decoder", **sampling)
        first = next(slow)
        others = [client.generate(f"{PROMPT} {number}", model="decoder", **GREEDY) for number in range(4)]
        assert all(answer.finish_reason for answer in others)
        server.wait_idle()  # also the slow one's answer is there
        text = first.text + "".join(piece.text for piece in slow)
        assert text == client.generate(PROMPT, model="decoder", **sampling).text


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        ({"temperature": -1}, InvalidRequest, "temperature"),
        ({"max_tokens": 100_000}, InvalidRequest, "context of 4096"),
        ({"no_such": 1}, InvalidRequest, "no_such"),
        ({"guided_regex": "("}, InvalidRequest, "regex"),
        ({"input_ids": [2**31 - 1]}, InvalidRequest, "from 0 to 49151"),
        ({"input_ids": [1] * 5000}, InvalidRequest, "4096"),
        ({"messages": [{"role": "user"}] * 5000}, InvalidRequest, "messages"),
        ({"messages": []}, InvalidRequest, "message"),
        ({"model": "nobody"}, NotFound, "nobody"),
        ({"model": "tokenizer"}, InvalidRequest, "older than this client"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_the_server_refuses_says_why_and_harms_nobody(
    clients: Clients, server: RunningServer, wrong: dict[str, Any], kind: type[TidewrightError], says: str
) -> None:
    given = {} if {"input_ids", "messages"} & set(wrong) else {"prompt": PROMPT}
    with clients(server.grpc_url) as client:
        beside = client.stream(PROMPT, **{**GREEDY, "max_tokens": 40})
        next(beside)
        with pytest.raises(kind, match=says) as refused:
            client.generate(**given, **wrong)
        assert refused.value.request_id
        assert list(beside)[-1].text is not None


def test_vectors_need_another_server(clients: Clients, server: RunningServer) -> None:
    with clients(server.grpc_url) as client, pytest.raises(InvalidRequest, match="--task embed"):
        client.embed(PROMPT)


def test_a_connection_that_breaks_ends_what_ran_and_the_next_is_new(clients: Clients, server: RunningServer) -> None:
    with ByteRelay(server.settings.grpc_port) as relay, clients(f"127.0.0.1:{relay.port}") as client:
        stream = client.stream(PROMPT, model="decoder", **LONG)
        first = next(stream)
        relay.cut()
        with pytest.raises(Interrupted) as cut:
            list(stream)
        assert cut.value.partial.text.startswith(first.text)
        with clients(f"127.0.0.1:{relay.port}", max_retries=2) as patient:
            assert patient.generate(PROMPT, **GREEDY).text
        until(lambda: client.health())
        assert client.generate(PROMPT, **GREEDY).finish_reason == "length"
    server.wait_idle()  # Triton cancels what ran on a connection that is gone


def repository(server: RunningServer, action: str) -> None:
    url = f"{server.triton.http_url}/v2/repository/models/decoder/{action}"
    assert httpx.post(url, json={}, timeout=120, trust_env=False).status_code == 200


def state(server: RunningServer) -> str:
    url = f"{server.triton.http_url}/v2/repository/index"
    index = httpx.post(url, json={}, timeout=120, trust_env=False).json()
    return next(found["state"] for found in index if found["name"] == "decoder")


@needs("chaos")
def kill(server: RunningServer) -> None:
    os.kill(server.triton.pid or 0, signal.SIGKILL)


def test_unloading_with_clients_connected_and_a_server_that_dies(model_dir: Path) -> None:
    """An idle client does not keep Triton from unloading the model; a dead server is told from an end."""
    with RunningServer(model_dir) as server:
        kinds = [Clients("sync"), Clients("async")]
        idle = [kind(server.grpc_url) for kind in kinds]
        for client in idle:
            assert client.generate(PROMPT, model="decoder", **GREEDY).text
        repository(server, "unload")
        until(lambda: state(server) == "UNAVAILABLE")
        for client in idle:
            with pytest.raises(NotFound):
                client.generate(PROMPT, model="decoder", **GREEDY)
        repository(server, "load")
        streams = [client.stream(PROMPT, model="decoder", **LONG) for client in idle]
        for stream in streams:
            next(stream)
        kill(server)
        for stream in streams:
            with pytest.raises(Interrupted):
                list(stream)
        for client in idle:
            with pytest.raises(ConnectionFailed):
                client.generate(PROMPT, **GREEDY)
        server.triton.start_again()
        for client, kind in zip(idle, kinds, strict=True):
            until(client.health)
            assert client.generate(PROMPT, model="decoder", **GREEDY).text
            client.close()
            kind.stop()
