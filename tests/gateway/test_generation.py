"""What is written of a stream, before a replica in this process that answers at once."""

from __future__ import annotations

import asyncio
import time

from benchmarks.echo_replica import Echo, start
from tidewright.bench.machine import free_ports
from tidewright.schema import SamplingParams
from tidewright_gateway.answers import DONE, ChatAnswer
from tidewright_gateway.cluster import Cluster
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.generation import Generator, make_work
from tidewright_gateway.metrics import Metrics


async def written(n: int, pause: float) -> list[bytes]:
    (port,) = free_ports(1)
    server = await start(port, Echo(8, pause))
    metrics = Metrics()
    cluster = Cluster(GatewaySettings(replicas=f"127.0.0.1:{port}", patience=30), metrics, 1000)
    await cluster.start()
    try:
        sampling = SamplingParams(max_tokens=20)
        work = make_work("id", [[1]], sampling, n, max_model_len=1000, longest=60, arrived_at=time.monotonic())
        answer = ChatAnswer("id", "model", None, True)
        return [part async for part in Generator(cluster, metrics).stream(work, answer)]
    finally:
        await cluster.stop()
        await server.stop(0)


def test_what_is_there_together_is_written_together() -> None:
    parts = asyncio.run(written(1, 0.01))
    assert [part.count(b"data: ") for part in parts] == [2, 1, 3]  # opening and piece; piece; piece, usage and end
    assert b'"role":"assistant"' in parts[0]
    assert b'"finish_reason":"length"' in parts[-1]
    assert parts[-1].endswith(DONE)


def test_a_choice_that_ends_early_is_not_held_back_for_the_others() -> None:
    parts = asyncio.run(written(2, 0.01))
    assert b'"index":0' in parts[0]
    assert b'"index":1' in parts[0]
    assert [part.count(b"data: ") for part in parts] == [3, 1, 1, 1, 1, 3]
