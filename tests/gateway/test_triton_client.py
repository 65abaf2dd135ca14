"""The gateway's gRPC client, before a replica in this process that answers at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from benchmarks.echo_replica import Echo, start
from helpers.triton import RunningServer
from tidewright.bench.machine import free_ports
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright_gateway.replicas.triton import CallRequest, Reply, TritonCall, TritonClient

ORDER = CallRequest("one", [1, 2, 3], b'{"max_tokens":20}')


@asynccontextmanager
async def client(pause: float = 0.0) -> AsyncIterator[TritonClient]:
    (port,) = free_ports(1)
    server = await start(port, Echo(8, pause))
    made = TritonClient(f"127.0.0.1:{port}", 2)
    try:
        yield made
    finally:
        await made.close()
        await server.stop(0)


async def all_of(call: TritonCall) -> list[Reply]:
    replies = [await call.read()]
    while not replies[-1].finish_reason:
        replies.append(await call.read())
    call.close()
    return replies


def test_replies_come_in_parts_and_only_the_last_has_a_reason() -> None:
    async def run() -> list[Reply]:
        async with client() as made:
            return await all_of(made.generate("decoder", ORDER))

    replies = asyncio.run(run())
    assert [len(reply.token_ids) for reply in replies] == [8, 8, 4]
    assert [reply.finish_reason for reply in replies] == [None, None, "length"]


def of_server(server: RunningServer, details: bool = True, **sampling: Any) -> list[Reply]:
    """All replies of a real Triton to a prompt of 40 tokens."""
    prompt, own = list(range(500, 540)), msgspec.json.encode({"temperature": 0, **sampling})
    order = CallRequest("one", prompt, own, logprobs="logprobs" in sampling, details=details)

    async def run() -> list[Reply]:
        made = TritonClient(server.grpc_url, 1)
        try:
            return await all_of(made.generate("decoder", order))
        finally:
            await made.close()

    return asyncio.run(run())


def test_what_is_told_once_is_in_the_first_reply_or_in_the_last(server: RunningServer) -> None:
    options = {"max_tokens": 9, "ignore_eos": True, "cache_salt": f"{time.time_ns()}"}
    free = of_server(server, **options)
    end = next(reply for reply in free[2:] if reply.text.strip())
    stop_token, stop = end.token_ids[0], end.text
    # Two blocks of 16 tokens are cached since the first time; with prompt_logprobs all of the prompt is computed.
    for more, reason, cached in (
        ({"stop_token_ids": [stop_token]}, stop_token, 32),
        ({"stop": stop}, stop, 32),
        ({}, None, 32),
        ({"prompt_logprobs": 1, "logprobs": 0}, None, 0),
    ):
        replies = of_server(server, **options, **more)
        others = [None] * (len(replies) - 1)
        assert len(others) > 1
        assert [reply.num_cached_tokens for reply in replies] == [cached, *others]
        assert [reply.stop_reason for reply in replies] == [*others, reason]
        assert [reply.prompt_logprobs for reply in replies[1:]] == others
        told = replies[0].prompt_logprobs
        assert (told and len(json.loads(told))) == (40 if "prompt_logprobs" in more else None)
        assert [reply.logprobs is not None for reply in replies] == ["logprobs" in more] * len(replies)
    assert free[0].num_cached_tokens == 0


def test_unasked_nothing_more_comes(server: RunningServer) -> None:
    for reply in of_server(server, details=False, max_tokens=3, stop_token_ids=list(range(1000))):
        assert (reply.prompt_logprobs, reply.stop_reason, reply.num_cached_tokens) == (None, None, None)


@pytest.mark.parametrize("turns", [1, 2, 5, 50])
def test_an_abandoned_generation_ends_however_early_that_was(turns: int) -> None:
    """grpc's `write` waited for ever if the call was cancelled before it had begun."""

    async def run() -> None:
        async with client(pause=60) as made:
            await made.control("status", 30)  # it can be reached
            call = made.generate("decoder", ORDER)
            job = asyncio.ensure_future(all_of(call))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.abandon(ModelError("it is lost", Outcome.STALLED))
            ended, _ = await asyncio.wait((job,), timeout=10)
            assert ended
            with pytest.raises(ModelError, match="it is lost"):
                job.result()

    asyncio.run(run())
