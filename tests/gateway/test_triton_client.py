"""The gateway's gRPC client, before a replica in this process that answers at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.echo_replica import Echo, start
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
