"""The gateway before the real Triton with the embedded model: what it adds, and how long a failover takes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec

from benchmarks.gateway_load import Answer, Cpu, GrpcClient, HttpClient, Load, at_once, request
from benchmarks.gateway_parts import MODEL, Row, gateway, model_folder, show
from tidewright.bench.machine import free_ports, wait_idle
from tidewright.bench.targets import running_server
from tidewright.bench.workloads import token_ids
from tidewright.config import Settings
from tidewright.schema import SamplingParams
from tidewright_gateway.replicas.triton import CallRequest, make_request

PROMPT, TOKENS = 16, 64
RUNNING, MOVED_TOKENS = 8, 200  # streams that run when a replica is killed, and their tokens
NEW, EVERY = 10, 0.02  # requests that begin then, and the seconds between them


@contextmanager
def tritons(count: int) -> Iterator[list[tuple[int, str]]]:
    """Process id and gRPC address of each."""
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            http, grpc, metrics = free_ports(3)
            # Two engines that take both cores keep each other waiting.
            threads = max((os.cpu_count() or 1) // count, 1)
            settings = Settings(http_port=http, grpc_port=grpc, metrics_port=metrics, shutdown_grace=0, threads=threads)
            server, _ = stack.enter_context(running_server(settings, model_folder()))
            assert server.pid
            made.append((server.pid, f"127.0.0.1:{grpc}"))
        yield made


class Requests:
    """Greedy, of a set length, each with a prompt of its own, so that none finds its beginning in the KV cache."""

    def __init__(self, tokens: int = TOKENS) -> None:
        self._ids, self._rng, self._tokens = token_ids(model_folder()), random.Random(0), tokens

    def _prompt(self) -> list[int]:
        return self._rng.choices(self._ids, k=PROMPT)

    def body(self) -> dict[str, Any]:
        options = {"max_tokens": self._tokens, "ignore_eos": True, "temperature": 0}
        return {"model": MODEL, "prompt": self._prompt(), **options}

    def through(self) -> bytes:
        return request({**self.body(), "stream": True}, "/v1/completions")

    def direct(self) -> bytes:
        sampling = SamplingParams(max_tokens=self._tokens, ignore_eos=True, temperature=0)
        order = CallRequest(f"{self._rng.random()}", self._prompt(), msgspec.json.encode(sampling))
        return make_request("decoder", order).SerializeToString()


def _figures(load: Load) -> dict[str, float]:
    if load.errors:
        raise SystemExit(f"{load.errors.total()} requests failed: {load.errors.most_common(3)}")
    pieces = [(last - first) / (TOKENS - 1) for first, last in zip(load.firsts, load.lasts, strict=True)]
    return {
        "TTFT, ms": 1e3 * statistics.median(load.firsts),
        "TPOT, ms": 1e3 * statistics.median(pieces),
        "requests/s": load.rate,
    }


async def added_by_gateway(rounds: int) -> None:
    """TTFT, TPOT and requests a second, directly and through the gateway in turn."""
    rows, below, requests = [], [], Requests()
    with tritons(1) as ((pid, url),), gateway([url]) as running:
        client, replica = HttpClient(running.port), GrpcClient(url)

        async def through() -> Answer:
            return await client.generate(requests.through(), True, None)

        async def direct() -> Answer:
            return await replica.generate(requests.direct(), None)

        for streams in (1, 16):
            found: dict[str, list[tuple[float, float]]] = {}
            for number in range(rounds + 1):
                wait_idle(2)
                alone = _figures(await at_once(direct, streams))
                wait_idle(2)
                cpu = Cpu(gateway=running.pid, triton=pid)
                behind = _figures(await at_once(through, streams))
                if number:  # the first warms up
                    for name, value in alone.items():
                        found.setdefault(name, []).append((value, behind[name]))
            for name, pairs in found.items():
                a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
                ratio = statistics.median(after / before for before, after in pairs)
                rows.append(Row(f"streams: {streams}; {name}", f"{a:.2f} direct, {b:.2f} through: {ratio:.3f}x"))
            below.append(f"streams: {streams}: {cpu.text(streams)}")
        client.close()
        await replica.close()
    show(f"before the real Triton, {TOKENS} tokens each, medians of {rounds} rounds in turn", rows, below)


async def failover(rounds: int) -> None:
    """Kills one of two Tritons while streams run at both."""
    waits: dict[str, list[float]] = {"usual": [], "kill": [], "new": [], "running": []}
    for _ in range(rounds):
        with tritons(2) as made, gateway([url for _, url in made]) as running:
            client, long, short = HttpClient(running.port), Requests(MOVED_TOKENS), Requests(4)
            usual = await _new_requests(client, short.through)
            streams = [await client.connect() for _ in range(RUNNING)]
            answers = [connection.send(long.through()) for connection in streams]
            while not all(len(connection.times) > 10 for connection in streams):
                await asyncio.sleep(0.01)
            os.kill(made[0][0], signal.SIGKILL)
            killed = time.perf_counter()
            new = await _new_requests(client, short.through)
            moved = await asyncio.gather(*answers)
            errors = [answer.error or answer.status for answer in (*moved, *usual, *new) if not _is_whole(answer)]
            if errors:
                raise SystemExit(f"{len(errors)} requests failed: {errors[:3]}")
            waits["usual"].append(statistics.median(answer.times[0] - answer.sent for answer in usual))
            waits["kill"].append(min(answer.times[0] for answer in new) - killed)
            waits["new"].append(max(answer.times[0] - answer.sent for answer in new))
            waits["running"].append(max(next(at for at in answer.times if at > killed) - killed for answer in moved))
            client.close()
    ms = {name: 1e3 * statistics.median(found) for name, found in waits.items()}
    rows = [
        Row("new request without a kill, first byte", f"{ms['usual']:.0f} ms"),
        Row("from the kill to the first byte of a new request", f"{ms['kill']:.0f} ms", "< 100 ms", ms["kill"] < 100),
        Row(f"longest of {NEW} new requests, first byte", f"{ms['new']:.0f} ms"),
        Row(
            f"from the kill until all {RUNNING} running streams go on",
            f"{ms['running']:.0f} ms",
            "< 1000 ms",
            ms["running"] < 1000,
        ),
    ]
    show(f"failover, one of two Tritons killed, medians of {rounds}", rows)


async def _new_requests(client: HttpClient, make: Callable[[], bytes]) -> list[Answer]:
    running = []
    for _ in range(NEW):
        running.append(asyncio.create_task(client.send(make())))
        await asyncio.sleep(EVERY)
    return await asyncio.gather(*running)


def _is_whole(answer: Answer) -> bool:
    return answer.status == 200 and b'"finish_reason":"length"' in answer.body
