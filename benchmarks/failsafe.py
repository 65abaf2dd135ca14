"""What `failsafe` costs, and how fast the fallback takes over. `python -m benchmarks.failsafe`; needs an idle machine.

overhead   time to the first token and per token through `failsafe`, beside `decoder` itself, in turn
takeover   from the end of the main model to the fallback's tokens, for streams that run and for some that begin
beside     what the decoder loses while the fallback answers others
kills      streams all the time, and the engine is killed again and again: who got what
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as grpcclient
from rich.console import Console

from benchmarks.recovery import engine_of
from tidewright.bench.machine import free_ports, wait_idle
from tidewright.bench.targets import TritonTarget, running_server
from tidewright.bench.workloads import Request, token_ids
from tidewright.cache import EMBEDDED_MODEL, fallback_path
from tidewright.config import Settings
from tidewright.launch.export import export
from tidewright.launch.prepare import prepare
from tidewright.launch.server import TritonServer

PATIENCE = 60.0  # seconds


@dataclass
class Stream:
    """What came of one request, and when."""

    began: float
    times: list[float] = field(default_factory=list)  # of each response
    tokens: int = 0
    served: list[tuple[str, float]] = field(default_factory=list)
    error: str = ""
    over: bool = False

    @property
    def from_fallback(self) -> float:
        """When its first token from the fallback came."""
        return next((at for by, at in self.served if by == "fallback"), float("nan"))


class Client:
    def __init__(self, url: str) -> None:
        self._client = grpcclient.InferenceServerClient(url)
        self._arrived: queue.Queue[tuple[float, Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: self._arrived.put((time.monotonic(), result, error)))
        self.streams: dict[str, Stream] = {}

    def send(self, name: str, max_tokens: int) -> None:
        options = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
        tensors = []
        for key, datatype, value in (
            ("text_input", "BYTES", np.array([f"Once upon a time, {name}".encode()], dtype=np.object_)),
            ("stream", "BOOL", np.array([True])),
            ("sampling_parameters", "BYTES", np.array([json.dumps(options).encode()], dtype=np.object_)),
        ):
            tensors.append(grpcclient.InferInput(key, list(value.shape), datatype))
            tensors[-1].set_data_from_numpy(value)
        self.streams[name] = Stream(time.monotonic())
        self._client.async_stream_infer("failsafe", tensors, request_id=name, enable_empty_final_response=True)

    def take(self, timeout: float = PATIENCE) -> Stream | None:
        """The next response's stream; None if none came."""
        try:
            at, result, error = self._arrived.get(timeout=timeout)
        except queue.Empty:
            return None
        if error is not None:  # the client library drops its request's id
            stream = next(stream for stream in self.streams.values() if not stream.over)
            stream.error, stream.over = str(error), True
            return stream
        response = result.get_response()
        stream = self.streams[response.id]
        if response.outputs:
            stream.times.append(at)
            stream.tokens += len(result.as_numpy("output_ids"))
            if (served_by := result.as_numpy("served_by")) is not None:
                stream.served.append((served_by[0].decode(), at))
        stream.over |= response.parameters["triton_final_response"].bool_param
        return stream

    def finish(self) -> list[Stream]:
        while any(not stream.over for stream in self.streams.values()):
            if self.take() is None:
                raise SystemExit(f"nothing came for {PATIENCE:g} s")
        return list(self.streams.values())

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


def overhead(url: str, ids: range, streams: int, rounds: int) -> None:
    targets = {model: TritonTarget(url, model) for model in ("decoder", "failsafe")}
    rng = random.Random(0)
    firsts: dict[str, list[float]] = {model: [] for model in targets}
    tokens: dict[str, list[float]] = {model: [] for model in targets}
    for _ in range(rounds):
        for model, target in targets.items():
            wait_idle()
            outcomes = target.run([Request(rng.choices(ids, k=16), 128) for _ in range(streams)])
            firsts[model].append(1e3 * statistics.median(outcome.first for outcome in outcomes))
            tokens[model].append(1e3 * statistics.median(outcome.token_seconds for outcome in outcomes))
    for what, found in (("first token", firsts), ("per token", tokens)):
        direct, through = (statistics.median(found[model]) for model in targets)
        apart = statistics.median(b - a for a, b in zip(found["decoder"], found["failsafe"], strict=True))
        print(
            f"{streams:2} streams, {what:11}: decoder {direct:6.2f} ms, failsafe {through:6.2f} ms, {apart:+.2f} ms",
            flush=True,
        )
    for target in targets.values():
        target.close()


def beside(url: str, ids: range, streams: int, rounds: int) -> None:
    decoder, fallback = TritonTarget(url, "decoder"), TritonTarget(url, "fallback")
    rng = random.Random(0)
    alone, disturbed, of_fallback = [], [], []

    def decode() -> float:
        outcomes = decoder.run([Request(rng.choices(ids, k=16), 128) for _ in range(streams)])
        return 1 / statistics.median(outcome.token_seconds for outcome in outcomes)

    def answer(until: threading.Event) -> None:
        while not until.is_set():
            outcomes = fallback.run([Request(rng.choices(ids, k=16), 48) for _ in range(streams)])
            of_fallback.extend(1 / outcome.token_seconds for outcome in outcomes)

    for _ in range(rounds):
        wait_idle()
        alone.append(decode())
        until = threading.Event()
        thread = threading.Thread(target=answer, args=[until])
        thread.start()
        time.sleep(0.5)
        disturbed.append(decode())
        until.set()
        thread.join()
    print(
        f"{streams:2} streams at each: decoder alone {statistics.median(alone):.1f} tokens/s a stream, beside the "
        f"fallback {statistics.median(disturbed):.1f}, which gives {statistics.median(of_fallback):.1f}",
        flush=True,
    )
    for target in (decoder, fallback):
        target.close()


@contextmanager
def gone(server: TritonServer, how: str) -> Iterator[float]:
    """The decoder's engine is gone: stopped, or killed as often as one comes up. Gives the time of it."""
    engine = engine_of(server)
    if how == "stopped":
        engine.suspend()
        try:
            yield time.monotonic()
        finally:
            engine.resume()
        return
    stub, over = engine.parent(), threading.Event()
    assert stub is not None

    def kill() -> None:
        while not over.wait(0.02):
            for process in stub.children():
                with suppress(psutil.NoSuchProcess):  # it was quicker
                    process.kill()

    engine.kill()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield time.monotonic()
    finally:
        over.set()
        killer.join()


def takeover(server: TritonServer, url: str, how: str, streams: int, rounds: int, *, running: bool) -> None:
    """Prints the seconds from the end of the engine to the fallback's first tokens."""
    first, middle, last = [], [], []
    for _ in range(rounds):
        client = Client(url)
        names = [str(number) for number in range(streams)]
        if running:
            for name in names:
                client.send(name, 100)
            while min(stream.tokens for stream in client.streams.values()) < 10:
                client.take()
        with gone(server, how) as at:
            if not running:
                for name in names:
                    client.send(name, 100)
            got = client.finish()
        client.close()
        if errors := [stream.error for stream in got if stream.error]:
            raise SystemExit(f"{len(errors)} streams failed: {errors[0]}")
        waits = sorted(stream.from_fallback - at for stream in got)
        first.append(waits[0])
        middle.append(statistics.median(waits))
        last.append(waits[-1])
        wait_until_well(url)
    what = "streams that run" if running else "streams that begin"
    print(
        f"engine {how}, {streams} {what}: first token of the fallback after {statistics.median(first):.2f} s, of the "
        f"median stream {statistics.median(middle):.2f} s, of the last {statistics.median(last):.2f} s",
        flush=True,
    )


def wait_until_well(url: str) -> None:
    """The decoder answers again through `failsafe`, also several at once, and another engine stands by."""
    by: set[str] = set()
    while by != {"decoder"}:
        time.sleep(1)
        client = Client(url)
        for number in range(4):
            client.send(str(number), 1)
        by = {stream.served[-1][0] for stream in client.finish() if stream.served}
        client.close()
    time.sleep(7)


def kills(server: TritonServer, url: str, streams: int, minutes: float, every: float) -> None:
    client, began, killed = Client(url), time.monotonic(), 0
    rng, sent, longest = random.Random(0), 0, 0.0
    ended: Counter[str] = Counter()
    wrong = 0
    while (now := time.monotonic()) < began + 60 * minutes or client.streams:
        if now < began + 60 * minutes:
            while len(client.streams) < streams:
                client.send(str(sent), rng.randint(16, 256))
                sent += 1
            if now > began + every * (killed + 1):
                engine_of(server).kill()
                killed += 1
        client.take(0.1)
        for name, stream in [(name, stream) for name, stream in client.streams.items() if stream.over]:
            del client.streams[name]
            longest = max([longest, *(b - a for a, b in itertools.pairwise(stream.times))])
            ended[stream.served[-1][0] if stream.served else stream.error] += 1
            wrong += bool(stream.error)
    client.close()
    print(
        f"{minutes:g} minutes, {killed} kills, {sent} streams, {streams} at a time: {wrong} failed "
        f"({wrong / sent:.3%}); {dict(ended)}; the longest pause of a stream was {longest:.2f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["overhead", "takeover", "beside", "kills"]
    parser.add_argument("what", nargs="*", default=choices[:3], choices=choices)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5, help="of kills")
    parser.add_argument("--every", type=float, default=20, help="seconds between kills")
    options = parser.parse_args()
    folder, http, grpc, metrics = prepare(EMBEDDED_MODEL), *free_ports(3)
    fallback = fallback_path(EMBEDDED_MODEL)
    export(folder, fallback, ("int8",), Console(stderr=True))
    settings = Settings(http_port=http, grpc_port=grpc, metrics_port=metrics, shutdown_grace=0, fallback=str(fallback))
    url = f"127.0.0.1:{grpc}"
    with running_server(settings, folder) as (server, _):
        time.sleep(7)  # until another engine stands by
        if "overhead" in options.what:
            for streams in (1, options.streams):
                overhead(url, token_ids(folder), streams, options.rounds)
        if "takeover" in options.what:
            for how in ("killed", "stopped"):
                for running in (False, True):
                    takeover(server, url, how, options.streams, options.rounds, running=running)
        if "beside" in options.what:
            for streams in (1, 4):
                beside(url, token_ids(folder), streams, options.rounds)
        if "kills" in options.what:
            kills(server, url, options.streams, options.minutes, options.every)


if __name__ == "__main__":
    main()
