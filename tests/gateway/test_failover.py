"""Two real Tritons behind a real gateway, and one of them fails: killed, stopped, drained, or its stub dies."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from helpers.gateway import MODEL, RunningGateway
from helpers.processes import child, stub_of
from helpers.triton import RunningServer
from tidewright.resilience.deadline import Deadline
from tidewright.schema import SamplingParams
from tidewright.tokenization import Tokenizer
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.replicas.failover import Failover, Generation
from tidewright_gateway.replicas.health import Expected
from tidewright_gateway.replicas.triton import Reply

LENGTH = 80  # tokens; long enough to be in the middle
REQUESTS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time", "temperature": 0},
    {"prompt": "The sea", "temperature": 1, "seed": 5},
    {"prompt": "A list:", "temperature": 0.8, "seed": 6, "frequency_penalty": 0.5, "n": 2},
]


@pytest.fixture(scope="module")
def two(model_dir: Path) -> Iterator[list[RunningServer]]:
    # A thread each: two engines that take both cores keep each other waiting.
    options = {"dtype": "float32", "kv_cache_memory": "64MiB", "streaming_share": 1, "shutdown_grace": 30}
    with RunningServer(model_dir, **options) as one, RunningServer(model_dir, **options) as other:
        yield [one, other]


def stream(gateway: RunningGateway, request: dict[str, Any], begun: threading.Semaphore) -> list[str]:
    """Texts of its choices; `begun` is released when each has a few tokens."""
    body = {"model": MODEL, "max_tokens": LENGTH, "stream": True, "extra_body": {"ignore_eos": True}, **request}
    texts = [""] * body.get("n", 1)
    for number, piece in enumerate(gateway.openai.completions.create(**body)):
        texts[piece.choices[0].index] += piece.choices[0].text
        if number == 10 * len(texts):
            begun.release()
    return texts


def all_at_once(gateway: RunningGateway, when_they_run: Callable[[], None] | None = None) -> list[list[str]]:
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        futures = [pool.submit(stream, gateway, request, begun) for request in REQUESTS]
        for _ in REQUESTS:
            assert begun.acquire(timeout=60)
        if when_they_run:
            when_they_run()
        return [future.result(timeout=120) for future in futures]


def strike(server: RunningServer, how: str) -> None:
    victim = psutil.Process(server.triton.pid)
    if how == "kill":
        victim.kill()
    elif how == "stub":
        stub_of(server, "decoder").kill()
    else:
        child(victim.pid, "tidewright.engine").suspend()


@pytest.mark.parametrize("blows", [["stop", "kill"], ["stub"]])
def test_streams_go_on_where_their_replica_left_them(
    model_dir: Path, pair: list[RunningServer], blows: list[str]
) -> None:
    # By turns: the loads that replicas tell may send all streams to one.
    with RunningGateway(model_dir, *pair, wait_for_replica=2, slow_start=0, routing="round_robin") as gateway:
        undisturbed = all_at_once(gateway)
        for how in blows:
            moved = gateway.metric("streams_moved_total")
            assert all_at_once(gateway, lambda how=how: strike(pair[0], how)) == undisturbed
            assert gateway.metric("streams_moved_total") > moved
            assert gateway.metric("replica_up", replica=pair[0].grpc_url) == 0
            # New requests go to the other one at once.
            body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
            for _ in range(4):
                assert "Paris" in gateway.post("/v1/completions", body).json()["choices"][0]["text"]
            if how == "stop":
                child(pair[0].triton.pid or 0, "tidewright.engine").resume()
                deadline = time.monotonic() + 30
                while not gateway.metric("replica_up", replica=pair[0].grpc_url):
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
        if "kill" in blows:
            the_last_one_dies_and_comes_back(gateway, pair[1])


def test_what_is_told_of_the_prompt_comes_once_however_often_the_stream_moves(
    tokenizer: Tokenizer, model_dir: Path, pair: list[RunningServer]
) -> None:
    """The first attempt fails before its first token, the second one in the middle."""
    sampling = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, prompt_logprobs=0, stop_token_ids=[0])
    addresses = ",".join(one.grpc_url for one in pair)

    async def main() -> list[Reply]:
        settings = GatewaySettings(replicas=addresses, routing="round_robin", slow_start=0, wait_for_replica=30)
        failover = Failover(settings, Metrics(), Expected(model_dir.name, tokenizer.fingerprint), 4096)
        engines = [child(one.triton.pid or 0, "tidewright.engine") for one in pair]
        await failover.start()
        replies, generation = [], Generation("r", tokenizer.encode("Once upon a time"), sampling, Deadline())
        try:
            engines[0].suspend()  # round robin begins there
            async with aclosing(failover.generate(generation)) as stream:
                async for reply in stream:
                    replies.append(reply)
                    if len(replies) == 5:
                        engines[0].resume()
                        engines[1].suspend()
        finally:
            for engine in engines:
                engine.resume()
            await failover.stop()
        assert generation.served_by == [pair[number].grpc_url for number in (0, 1, 0)]
        return replies

    replies = asyncio.run(main())
    assert sum(len(reply.token_ids) for reply in replies) == LENGTH
    others = [None] * (len(replies) - 1)
    assert replies[0].prompt_logprobs
    assert [reply.prompt_logprobs for reply in replies[1:]] == others
    assert [reply.num_cached_tokens for reply in replies] == [0, *others]
    assert [reply.stop_reason for reply in replies] == [None, *others]


def the_last_one_dies_and_comes_back(gateway: RunningGateway, last: RunningServer) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    strike(last, "kill")
    refused = gateway.post("/v1/completions", body)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    late = gateway.post("/v1/completions", {**body, "timeout": 0.2})
    assert late.status_code == 408
    last.triton.start_again()
    assert "Paris" in gateway.post("/v1/completions", body).json()["choices"][0]["text"]


def test_when_all_are_gone_requests_wait_and_then_get_a_503_and_a_replica_that_comes_back_is_found(
    model_dir: Path, server: RunningServer
) -> None:
    engine = child(server.triton.pid or 0, "tidewright.engine")
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    with RunningGateway(model_dir, server, wait_for_replica=2, generation_probe_interval=0.2) as gateway:
        deadline = time.monotonic() + 30
        while gateway.metric("generation_probes_total", outcome="success") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert gateway.metric("generation_probes_total") == gateway.metric("generation_probes_total", outcome="success")
        engine.suspend()
        try:
            deadline = time.monotonic() + 60
            while gateway.http.get("/health/ready").status_code == 200:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            refused = gateway.post("/v1/completions", body)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert "no replica can take requests" in refused.json()["error"]["message"]
            assert "no sign of life" in gateway.http.get("/admin/status").json()["replicas"][0]["trouble"]
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(gateway.post, "/v1/completions", body)
                time.sleep(0.5)
                engine.resume()
                assert "Paris" in waiting.result().json()["choices"][0]["text"]
        finally:
            engine.resume()


def test_round_robin_gives_equal_shares_and_one_that_drains_ends_what_it_has(
    model_dir: Path, pair: list[RunningServer]
) -> None:
    # Patience for a busy machine: a replica that is short of CPU would lose its turn, or its streams.
    with RunningGateway(model_dir, *pair, routing="round_robin", patience=30) as gateway:

        def shares() -> list[float]:
            return [gateway.metric("attempts_total", replica=one.grpc_url) for one in pair]

        body = {"prompt": "Once", "max_tokens": 4, "ignore_eos": True}
        with ThreadPoolExecutor(4) as pool:
            statuses = list(pool.map(lambda _: gateway.post("/v1/completions", body).status_code, range(40)))
        assert statuses == [200] * 40
        assert shares() == [20, 20]

        undisturbed = all_at_once(gateway)

        def drain() -> None:
            assert pair[0].control("drain").status_code == 200

        assert all_at_once(gateway, drain) == undisturbed
        assert gateway.metric("streams_moved_total") == 0
        before = shares()
        for _ in range(4):
            assert gateway.post("/v1/completions", body).status_code == 200
        assert [now - then for now, then in zip(shares(), before, strict=True)] == [0, 4]


def test_the_gateway_ends_gently(model_dir: Path, server: RunningServer) -> None:
    with RunningGateway(model_dir, server) as gateway:
        body = {"model": MODEL, "prompt": "Once", "max_tokens": 40, "ignore_eos": True, "stream": True}
        with gateway.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(gateway.process.pid, signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert gateway.process.wait(60) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{gateway.url}/health/live", trust_env=False)
