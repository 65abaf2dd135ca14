"""The same work by three protocols. `python -m benchmarks.protocols`; needs an idle machine, and three minutes of it.

REST with JSON and gRPC with binary tensors, both to Triton itself, and OpenAI's API through the gateway; before the
real Triton with the embedded model. Latency is that of a request alone, in turns; then many callers at once give the
rate and the CPU time of each process for a request. Bytes are counted at a TCP relay, in a pass of their own, over
connections that stand: what sockets carry, without the headers of TCP and IP.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import psutil
import uvloop

from benchmarks.byte_relay import ByteRelay
from benchmarks.gateway_load import family
from benchmarks.gateway_parts import Row, console, gateway, model_folder, show
from benchmarks.protocols_ways import (
    CALLS,
    GRPC,
    HTTPX,
    OPENAI,
    REST,
    Ask,
    Calls,
    Grpc,
    OpenAI,
    Rest,
    RestByHttpx,
    Work,
    payload_of_ids,
)
from tidewright.bench.machine import description, free_ports, wait_idle
from tidewright.bench.sweep import percentile
from tidewright.bench.targets import running_server
from tidewright.bench.workloads import token_ids
from tidewright.config import Settings
from tidewright.schema import Task
from tidewright.tokenization import Tokenizer

SENTENCE = "The lighthouse keeper climbed the stairs and looked out over the sea. "
LONG_TOKENS = 2000
COUNTED = 4  # requests whose bytes are counted
MAKERS: dict[str, Any] = {REST: Rest, HTTPX: RestByHttpx, GRPC: Grpc, CALLS: Calls, OPENAI: OpenAI}


def works() -> list[Work]:
    tokenizer = Tokenizer(model_folder())
    ids = token_ids(model_folder())
    long_ids = [ids[number * 7 % len(ids)] for number in range(LONG_TOKENS)]
    long_text = (SENTENCE * LONG_TOKENS)[: len(SENTENCE) * LONG_TOKENS // len(tokenizer.encode(SENTENCE))]
    return [
        Work("server is live", "live"),
        Work("control: health", "health"),
        Work("tokenize 14 tokens", "tokenize", SENTENCE),
        Work(f"tokenize {len(tokenizer.encode(long_text))} tokens", "tokenize", long_text, callers=8),
        Work(f"{LONG_TOKENS} ids (cached), 1 token", "generate", input_ids=long_ids, callers=8),
        Work("16 ids, 16 tokens, streamed", "generate", input_ids=long_ids[:16], tokens=16, streams=True, callers=8),
        Work("text, 16 tokens, whole", "generate", SENTENCE, tokens=16, callers=8),
        Work("text, 16 tokens, streamed", "generate", SENTENCE, tokens=16, streams=True, callers=8),
        Work("text, 16 tokens, 5 logprobs", "generate", SENTENCE, tokens=16, logprobs=5, callers=8),
        Work("the embedding of 14 tokens", "embed", SENTENCE, callers=8),
    ]


@dataclass
class Figures:
    """Of one work by one way."""

    seconds: list[float] = field(default_factory=list)  # of requests alone
    rates: list[float] = field(default_factory=list)
    cpu: Counter[str] = field(default_factory=Counter)  # seconds by process
    requests: int = 0  # that the CPU time was for
    sent: float = 0.0
    received: float = 0.0

    def ms(self, share: float) -> float:
        return 1e3 * percentile(self.seconds, share)

    @property
    def bytes(self) -> float:
        return self.sent + self.received


class Processes:
    """CPU seconds by what each process is."""

    def __init__(self, triton: int, gateway: int) -> None:
        self._roots = {"triton": triton, "gateway": gateway}

    def seconds(self) -> Counter[str]:
        found: Counter[str] = Counter(client=time.process_time())  # type: ignore[arg-type]
        for name, pid in self._roots.items():
            for process in family(pid):
                try:
                    times, command = process.cpu_times(), " ".join(process.cmdline())
                except psutil.NoSuchProcess:
                    continue
                which = "engine" if "tidewright.engine" in command else "stubs" if "backend_stub" in command else name
                found[which] += times.user + times.system
        return found


async def alone(ask: Ask, seconds: float, into: Figures) -> None:
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        await ask()
        into.seconds.append(time.perf_counter() - began)


async def together(ask: Ask, callers: int, seconds: float, processes: Processes, into: Figures) -> None:
    before, began, done = processes.seconds(), time.perf_counter(), 0

    async def call() -> None:
        nonlocal done
        while time.perf_counter() < began + seconds:
            await ask()
            done += 1

    await asyncio.gather(*(call() for _ in range(callers)))
    took = time.perf_counter() - began
    into.cpu.update(processes.seconds() - before)
    into.requests += done
    into.rates.append(done / took)


@contextmanager
def servers(task: Task) -> Iterator[tuple[dict[str, int], Processes]]:
    """The ports by protocol."""
    with ExitStack() as stack:
        http, grpc_port, metrics = free_ports(3)
        settings = Settings(
            http_port=http, grpc_port=grpc_port, metrics_port=metrics, shutdown_grace=0, task=task, threads=1
        )
        server, _ = stack.enter_context(running_server(settings, model_folder()))
        assert server.pid
        running = stack.enter_context(gateway([f"127.0.0.1:{grpc_port}"], cache_size=0))
        yield (
            {REST: http, HTTPX: http, GRPC: grpc_port, CALLS: grpc_port, OPENAI: running.port},
            Processes(server.pid, running.pid),
        )


async def measure(options: argparse.Namespace) -> dict[str, dict[str, Figures]]:
    found: dict[str, dict[str, Figures]] = {}
    for task in get_args(Task):
        mine = [work for work in works() if (work.kind == "embed") == (task == "embed")]
        with servers(task) as (ports, processes):
            for work in mine:
                console.print(f"  {work.name} …")
                found[work.name] = await compare(work, ports, processes, options)
    return found


async def compare(
    work: Work, ports: dict[str, int], processes: Processes, options: argparse.Namespace
) -> dict[str, Figures]:
    makers = {name: MAKERS[name](port) for name, port in ports.items()}
    ways = {name: ask for name, maker in makers.items() if (ask := maker.way(work))}
    figures = {name: Figures() for name in ways}
    await same_answers(work, ways)
    for _ in range(options.rounds):
        for name, ask in ways.items():
            wait_idle(1)
            await alone(ask, options.seconds, figures[name])
        for name, ask in ways.items():
            await together(ask, work.callers, options.seconds, processes, figures[name])
    for maker in makers.values():
        await maker.close()
    await count_bytes(work, ports, figures)
    return figures


async def same_answers(work: Work, ways: dict[str, Ask]) -> None:
    """REST and gRPC give the same, and all are warm."""
    for _ in range(2):
        answers = {name: await ask() for name, ask in ways.items()}
    rest, others = answers[REST], answers[GRPC]
    # Floats in JSON are rounded.
    close = functools.partial(math.isclose, rel_tol=1e-4, abs_tol=1e-6)
    same = all(map(close, rest, others)) if work.kind == "embed" else rest == others
    if not same or not all(answers.values()):
        raise SystemExit(f"{work.name}: the answers differ: {answers}")


async def count_bytes(work: Work, ports: dict[str, int], figures: dict[str, Figures]) -> None:
    for name, into in figures.items():
        with ByteRelay(ports[name]) as relay:
            maker = MAKERS[name](relay.port)
            ask = maker.way(work)
            for _ in range(2):  # the connection, and what HTTP/2 remembers of headers
                await ask()
            sent, received = relay.sent, relay.received
            for _ in range(COUNTED):
                await ask()
            into.sent, into.received = (relay.sent - sent) / COUNTED, (relay.received - received) / COUNTED
            await maker.close()


def table(found: dict[str, dict[str, Figures]]) -> None:
    rows = []
    for work, figures in found.items():
        for name, of in figures.items():
            cpu = ", ".join(f"{which} {1e3 * of.cpu[which] / of.requests:.2f}" for which in sorted(of.cpu))
            value = (
                f"p50 {of.ms(50):.2f} ms, p99 {of.ms(99):.2f} ms, {statistics.median(of.rates):.0f}/s, "
                f"{of.sent:.0f} + {of.received:.0f} bytes"
            )
            rows.append(Row(f"{work}: {name}", value, cpu))
    show("each: alone, at once, bytes sent and received; CPU ms a request in the third column", rows)
    rows = []
    for work, figures in found.items():
        rest, grpc_way = figures[REST], figures[GRPC]
        for name in (REST, HTTPX):
            faster = 1 - grpc_way.ms(50) / figures[name].ms(50)
            rows.append(Row(f"{work}: gRPC's p50 is lower than of {name} by", f"{faster:.0%}", ">= 30%", faster >= 0.3))
        smaller = 1 - grpc_way.bytes / rest.bytes
        rows.append(Row("  its bytes are fewer by", f"{smaller:.0%}", ">= 70%", smaller >= 0.7))
    for work in list(found)[:3]:
        rate = statistics.median(found[work][GRPC].rates)
        rows.append(Row(f"{work}: gRPC, answers without a model", f"{rate:.0f}/s", ">= 5000/s", rate >= 5000))
    show("gRPC against REST/JSON", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.7, help="that each way is measured for, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    machine = description()
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, load {os.getloadavg()[0]:.1f}"
    )
    if not wait_idle():
        console.print("The machine is not idle: the figures are disturbed.")
    table(uvloop.run(measure(options)))
    ids = next(work.input_ids for work in works() if work.input_ids)
    text, tensor = payload_of_ids(ids)
    console.print(f"{LONG_TOKENS} token ids alone: {text} bytes as JSON, {tensor} as a tensor")


if __name__ == "__main__":
    main()
