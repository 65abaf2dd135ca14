"""How long streams stand still when their engine is killed. `python -m benchmarks.recovery`; needs an idle machine.

Sixteen streams run through the real Triton. SIGKILL hits the engine, again and again; printed is the time until the
first stream, and until all of them, got a further token. The wait before a start doubles each time, from 0.1 s.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import time
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as grpcclient

from tidewright.bench.machine import free_ports
from tidewright.cache import EMBEDDED_MODEL
from tidewright.config import Settings
from tidewright.launch.prepare import prepare
from tidewright.launch.server import TritonServer

PATIENCE = 120.0  # seconds


class Streams:
    """Running requests; which of them got tokens, and when."""

    def __init__(self, url: str, count: int, max_tokens: int) -> None:
        self.client = grpcclient.InferenceServerClient(url)
        self.arrived: queue.Queue[tuple[float, Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self.arrived.put((time.monotonic(), result, error)))
        self.count = count
        text = grpcclient.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"Once upon a time"], dtype=np.object_))
        stream = grpcclient.InferInput("stream", [1], "BOOL")
        stream.set_data_from_numpy(np.array([True]))
        options = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 1.0}
        for number in range(count):
            self.client.async_stream_infer("decoder", [text, stream], request_id=str(number), parameters=options)

    def wait_for_each(self, tokens: int) -> list[float]:
        """The times when each stream got its first token from now on; returns when all have so many."""
        times: dict[str, float] = {}
        counts = dict.fromkeys(map(str, range(self.count)), 0)
        while min(counts.values()) < tokens:
            at, result, error = self.arrived.get(timeout=PATIENCE)
            if error is not None:
                raise SystemExit(f"a request failed: {error}")
            name = result.get_response().id
            times.setdefault(name, at)
            counts[name] += len(result.as_numpy("output_ids"))
        return sorted(times.values())

    def close(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()

    def forget_what_came(self) -> None:
        while not self.arrived.empty():
            self.arrived.get()


def engine_of(server: TritonServer) -> psutil.Process:
    """Of the decoder: the fallback, if there is one, has another."""
    family = psutil.Process(server.pid).children(recursive=True)
    stub = next(process for process in family if "/decoder/" in " ".join(process.cmdline()))
    return min(stub.children(), key=psutil.Process.create_time)  # a younger one stands by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument(
        "--pause", type=float, default=8, help="seconds before each; with less than 5 no engine stands by yet"
    )
    parser.add_argument("--tokens", type=int, default=30, help="that each stream has got when the engine is killed")
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    options = parser.parse_args()
    http, grpc, metrics = free_ports(3)
    settings = Settings(http_port=http, grpc_port=grpc, metrics_port=metrics, model=options.model, shutdown_grace=0)
    server = TritonServer(settings, prepare(options.model))
    first_token, all_tokens = [], []
    try:
        server.start()
        server.wait_ready()
        for kill in range(options.kills):
            time.sleep(options.pause)
            streams = Streams(f"127.0.0.1:{grpc}", options.streams, options.tokens + 30)
            streams.wait_for_each(options.tokens)
            engine = engine_of(server)
            killed = time.monotonic()
            engine.kill()
            engine.wait(PATIENCE)
            time.sleep(0.3)  # what the dead engine had sent is on its way
            streams.forget_what_came()
            times = streams.wait_for_each(1)
            first_token.append(times[0] - killed)
            all_tokens.append(times[-1] - killed)
            print(
                f"kill {kill + 1}: {first_token[-1]:.2f} s to the first token, {all_tokens[-1]:.2f} s until all go on"
            )
            streams.close()
    finally:
        server.stop()
    print(
        f"median of {options.kills}: {statistics.median(first_token):.2f} s to the first token, "
        f"{statistics.median(all_tokens):.2f} s until all {options.streams} go on; no request failed"
    )


if __name__ == "__main__":
    main()
