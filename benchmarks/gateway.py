"""What the gateway itself costs. `python -m benchmarks.gateway`; needs an idle machine.

A replica that answers at once stands behind it, in a process of its own, so what a request takes is the gateway's.
Client, gateway and replica share the cores; what share of a core each used, and how much CPU time that is for each
request, stands below each table.

latency      what the gateway adds to a request at half of its capacity: requests arrive by chance, at the gateway and
             at the replica itself in turn
throughput   short answers a second, with one and with two worker processes
concurrency  many requests and many streams at the same time, none of which may fail
balance      how evenly requests go to replicas that are equal
bodies       how long the event loop stands still for bodies that are hard to read, and what memory they take
soak         memory, and false alarms of the health checks, under a mix of requests that lasts --soak seconds
triton       what the gateway adds to the real Triton with the embedded model
failover     from the end of one of two real Tritons until new requests, and running streams, get tokens from the other
websocket    first tokens of 100 streams over the WebSocket, from the real Triton
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import uvloop

from benchmarks.gateway_bodies import bodies
from benchmarks.gateway_load import Cpu, GrpcClient, HttpClient, Load, at_once, closed_loop, open_loop, request
from benchmarks.gateway_parts import MODEL, PER_RESPONSE, Echo, Gateway, Row, console, echoes, gateway, show
from benchmarks.gateway_soak import RATE, Soak, count_probes, slope, watch_memory
from benchmarks.gateway_triton import added_by_gateway, failover
from benchmarks.gateway_websocket import first_tokens
from tidewright.bench.machine import description, wait_idle
from tidewright_gateway.replicas.triton import CallRequest, make_request

SHORT, LONG = PER_RESPONSE, 16 * PER_RESPONSE  # tokens of an answer
LONG_RESPONSES = LONG // PER_RESPONSE
ATTEMPTS = ("attempts_total", "attempt_failures_total")
CALLERS = 32  # that find the capacity


def chat(max_tokens: int, stream: bool = False, **more: Any) -> bytes:
    """Without a seed, so no cache can answer."""
    messages = [{"role": "user", "content": "Tell me a story of the sea, please."}]
    return request({"model": MODEL, "messages": messages, "max_tokens": max_tokens, "stream": stream, **more})


def direct(max_tokens: int) -> bytes:
    """The same for the replica itself."""
    order = CallRequest("0", list(range(40)), f'{{"max_tokens":{max_tokens}}}'.encode())
    return make_request("decoder", order).SerializeToString()


class Pair:
    """Ways to send one kind of request: through the gateway, and to the replica itself."""

    def __init__(self, client: HttpClient, replica: GrpcClient, stream: bool) -> None:
        self._client, self._replica, self._stream = client, replica, stream
        self._tokens, self._responses = (LONG, LONG_RESPONSES) if stream else (SHORT, 1)

    @property
    def through(self) -> Any:
        raw = chat(self._tokens, self._stream)
        return lambda: self._client.generate(raw, self._stream, self._responses)

    @property
    def direct(self) -> Any:
        raw = direct(self._tokens)
        return lambda: self._replica.generate(raw, self._responses)


def check(load: Load) -> None:
    if load.errors:
        raise SystemExit(f"{load.errors.total()} requests failed: {load.errors.most_common(3)}")


async def latency(seconds: float, rounds: int) -> None:
    rows, below = [], []
    with echoes() as (echo,), gateway([echo.url]) as running:
        for stream in (False, True):
            client, replica = HttpClient(running.port), GrpcClient(echo.url)
            await client.warm(CALLERS)
            pair = Pair(client, replica, stream)
            await closed_loop(pair.through, CALLERS, 1)  # warm
            load = await closed_loop(pair.through, CALLERS, seconds)
            check(load)
            capacity = load.rate
            added: dict[str, list[float]] = {name: [] for name in ("p50", "p99", "first p50", "first p99")}
            absolute = []
            for number in range(rounds):
                wait_idle(2)
                alone = await open_loop(pair.direct, capacity / 2, seconds, number)
                cpu = Cpu(gateway=running.pid, replica=echo.pid)
                through = await open_loop(pair.through, capacity / 2, seconds, number)
                check(alone)
                check(through)
                for name, found in added.items():
                    share = int(name[-2:])
                    first = name.startswith("first")
                    found.append(through.ms(share, first) - alone.ms(share, first))
                absolute.append((alone.ms(50), through.ms(50), alone.ms(99), through.ms(99)))
            what = f"stream of {LONG_RESPONSES} responses" if stream else "short answer"
            for name, found in added.items():
                if name.startswith("first") and not stream:
                    continue
                value, most = statistics.median(found), 2 if name.endswith("p50") else 5
                rows.append(Row(f"{what}: added, {name}", f"{value:.2f} ms", f"<= {most} ms", value <= most))
            medians = [statistics.median(column) for column in zip(*absolute, strict=True)]
            below.append(
                f"{what}: capacity {capacity:.0f}/s, measured at half of it; p50 {medians[0]:.2f} ms direct and "
                f"{medians[1]:.2f} ms through the gateway, p99 {medians[2]:.2f} and {medians[3]:.2f} ms"
            )
            below.append(f"  {cpu.text(len(through.lasts))}")
            client.close()
            await replica.close()
    show(f"latency at half of capacity, medians of {rounds} rounds of {seconds:g} s", rows, below)


async def throughput(seconds: float, rounds: int) -> None:
    rows, below = [], []
    for workers in (1, 2):
        with echoes() as (echo,), gateway([echo.url], workers=workers) as running:
            client = HttpClient(running.port)
            await client.warm(CALLERS)
            for what, target, raw, stream, responses in (
                ("short answers", 1000, chat(SHORT), False, 1),
                ("cached short answers", 1000, chat(SHORT, temperature=0), False, 1),
                (f"streams of {LONG_RESPONSES} responses", None, chat(LONG, True), True, LONG_RESPONSES),
            ):
                send = functools.partial(client.generate, raw, stream, responses)
                await closed_loop(send, CALLERS, 1)  # warm
                rates = []
                for _ in range(rounds):
                    wait_idle(2)
                    cpu = Cpu(gateway=running.pid, replica=echo.pid)
                    load = await closed_loop(send, CALLERS, seconds)
                    check(load)
                    rates.append(load.rate)
                rate, figure = statistics.median(rates), f"{what}, workers: {workers}"
                asked = (f">= {target}/s", rate >= target) if target else ("", None)
                rows.append(Row(figure, f"{rate:.0f}/s", *asked))
                below.append(f"{figure}: {cpu.text(len(load.lasts))}")
            client.close()
    show(f"throughput, {CALLERS} callers, medians of {rounds} rounds of {seconds:g} s", rows, below)


async def concurrency(requests: int, streams: int) -> None:
    rows, below = [], []
    # Pauses, or the first would have ended before the last is there.
    with echoes(pause=0.2) as (echo,), gateway([echo.url]) as running:
        for stream, count in ((False, requests), (True, streams)):
            client = HttpClient(running.port)
            raw, responses = chat(LONG, stream), LONG_RESPONSES
            failed = _sum(await running.metrics(), ATTEMPTS[1])
            cpu = Cpu(gateway=running.pid, replica=echo.pid)
            send = functools.partial(client.generate, raw, stream, responses)
            highest = asyncio.create_task(_most_active(running, 2))
            load = await at_once(send, count)
            figure = f"{count} {'streams' if stream else 'requests'} at the same time: errors"
            rows.append(Row(figure, str(load.errors.total()), "0", not load.errors))
            below.append(
                f"{figure.partition(':')[0]}: {await highest:.0f} were in the gateway at once; first byte p99 "
                f"{load.ms(99, True):.0f} ms, last {load.ms(99):.0f} ms (the replica's pauses: "
                f"{200 * (LONG_RESPONSES - 1)} ms); {cpu.text(count)}"
            )
            taken = _sum(await running.metrics(), ATTEMPTS[1]) - failed
            rows.append(Row("  generations taken from a replica that was well", f"{taken:.0f}", "0", taken == 0))
            if load.errors:
                below.append(f"  {load.errors.most_common(3)}")
            if taken:
                reasons = Counter(line.rpartition("failed: ")[2] for line in running.log if "failed: " in line)
                below.append(f"  {reasons.most_common(3)}")
            client.close()
    show("concurrency", rows, below)


async def _most_active(running: Gateway, seconds: float) -> float:
    """Most requests that it had at a time."""
    until, most = time.monotonic() + seconds, 0.0
    while time.monotonic() < until:
        most = max(most, (await running.metrics())["requests_active",] - 1)  # less the question itself
        await asyncio.sleep(0.2)
    return most


async def balance(requests: int) -> None:
    rows = []
    for count in (2, 3):
        for routing in ("round_robin", "least_load"):
            with echoes(count, pause=0.005) as made, gateway([echo.url for echo in made], routing=routing) as running:
                client = HttpClient(running.port)
                raw = chat(2 * PER_RESPONSE)
                rate = 100.0 * count
                load = await open_loop(lambda: client.generate(raw, False), rate, requests / rate, count)  # noqa: B023
                check(load)
                metrics = await running.metrics()
                shares = [metrics["attempts_total", "decoder", echo.url] for echo in made]
                apart = (max(shares) - min(shares)) / statistics.mean(shares)
                figure = f"{count} replicas, {routing}: most and least busy apart by"
                rows.append(Row(figure, f"{apart:.1%}", "< 5%", apart < 0.05))
                client.close()
    show(f"balance over equal replicas, {requests} requests that arrive by chance", rows)


async def soak(seconds: float) -> None:
    with echoes(2, pause=0.005) as made, gateway([echo.url for echo in made]) as running:
        mix = Soak(HttpClient(running.port), chat(LONG), chat(LONG, True), LONG_RESPONSES)
        await mix.run(2)
        said, asked, metrics = len(running.log), await _probes(made), await running.metrics()
        cpu = Cpu(gateway=running.pid, **{f"replica {number}": echo.pid for number, echo in enumerate(made, 1)})
        memory, _ = await asyncio.gather(watch_memory(running.pid, seconds), mix.run(seconds))
        probes, after = await _probes(made) - asked, await running.metrics()
        alarms = [line for line in running.log[said:] if "fleet: 127." in line and not line.endswith("is well")]
        attempts, failed = (_sum(after, name) - _sum(metrics, name) for name in ATTEMPTS)
        active = after["requests_active",] - 1  # less the question itself
        below = [", ".join(f"{kind} {count}" for kind, count in mix.done.items()), cpu.text(mix.done.total())]
    growth = slope(memory)
    rows = [
        Row("memory of its own (USS), before and after", f"{memory[0].mib:.1f} and {memory[-1].mib:.1f} MiB"),
        Row("slope over the second half", f"{growth:+.2f} MiB/min", "<= 0.1 MiB/min", growth <= 0.1),
        Row("wrong answers", str(mix.wrong.total()), "0", not mix.wrong),
        Row("requests left behind", f"{active:.0f}", "0", active == 0),
        Row("replicas called sick that were well", f"{len(alarms)} of {probes}", "< 1%", len(alarms) < 0.01 * probes),
        Row("generations taken from a replica that was well", f"{failed:.0f} of {attempts:.0f}", "0", failed == 0),
    ]
    below += [f"{error}: {count}" for error, count in mix.wrong.most_common(5)] + alarms[:5]
    show(f"soak of {seconds:g} s, {RATE:g} requests/s that arrive by chance", rows, below)


async def _probes(made: Sequence[Echo]) -> int:
    return sum([await count_probes(echo.url) for echo in made])


def _sum(metrics: dict[tuple[str, ...], float], name: str) -> float:
    return sum(value for (series, *_), value in metrics.items() if series == name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    echo, real = (
        ["latency", "throughput", "concurrency", "balance", "bodies", "soak"],
        ["triton", "failover", "websocket"],
    )
    parser.add_argument("what", nargs="*", default=echo, choices=echo + real, metavar="WHAT")
    parser.add_argument("--triton", action="store_true", help="with the real Triton as well: the last three")
    parser.add_argument("--seconds", type=float, default=5, help="that a round lasts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--soak", type=float, default=60, help="seconds of the soak")
    options = parser.parse_args()
    what = {*options.what, *(real if options.triton else [])}
    machine = description()
    console.print(f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}")
    if not wait_idle():
        console.print("The machine is not idle: the figures are disturbed.")

    async def measure() -> None:
        if "latency" in what:
            await latency(options.seconds, options.rounds)
        if "throughput" in what:
            await throughput(options.seconds, options.rounds)
        if "concurrency" in what:
            await concurrency(1000, 500)
        if "balance" in what:
            await balance(3000)
        if "bodies" in what:
            await bodies()
        if "soak" in what:
            await soak(options.soak)
        if "triton" in what:
            await added_by_gateway(options.rounds)
        if "failover" in what:
            await failover(min(options.rounds, 3))
        if "websocket" in what:
            await first_tokens(min(options.rounds, 3))

    uvloop.run(measure())


if __name__ == "__main__":
    main()
