"""What a long prompt does to the streams beside it, with and without a pace. `python -m benchmarks.long_prompt`.

Two servers take turns, one with `prefill_step_time`, one without (0). Streams run; a long prompt comes. Printed are the
longest time that a stream stood still meanwhile, and the time to the long prompt's first token: medians with lowest and
highest.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time

import numpy as np
import tritonclient.grpc as grpcclient

from benchmarks.recovery import PATIENCE, Streams
from tidewright.bench.machine import free_ports
from tidewright.cache import EMBEDDED_MODEL
from tidewright.config import Settings
from tidewright.launch.prepare import prepare
from tidewright.launch.server import TritonServer

LONG = "long"


def measure(url: str, count: int, length: int) -> tuple[float, float]:
    """The longest gap of any of `count` streams, and the time to the first token of a prompt of `length`; seconds."""
    streams = Streams(url, count, 4000)
    try:
        streams.wait_for_each(10)
        ids = grpcclient.InferInput("input_ids", [length], "INT32")
        ids.set_data_from_numpy(np.array(random.choices(range(100, 9000), k=length), dtype=np.int32))  # in no cache
        sent = time.monotonic()
        streams.client.async_stream_infer("decoder", [ids], request_id=LONG, parameters={"max_tokens": 1})
        last, longest = dict.fromkeys(map(str, range(count)), sent), 0.0
        while True:
            at, result, error = streams.arrived.get(timeout=PATIENCE)
            if error is not None:
                raise SystemExit(f"a request failed: {error}")
            name = result.get_response().id
            if name == LONG:
                return max(longest, *(at - before for before in last.values())), at - sent
            longest = max(longest, at - last[name])
            last[name] = at
    finally:
        streams.close()


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):5.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--length", type=int, default=6000, help="of the long prompt, in tokens")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--step-time", type=float, default=Settings().prefill_step_time)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    options = parser.parse_args()
    figures: dict[float, list[tuple[float, float]]] = {0.0: [], options.step_time: []}
    with contextlib.ExitStack() as stack:
        urls = {}
        for step_time in figures:
            ports = dict(zip(("http_port", "grpc_port", "metrics_port"), free_ports(3), strict=True))
            settings = Settings(**ports, model=options.model, shutdown_grace=0, prefill_step_time=step_time)
            server = TritonServer(settings, prepare(options.model))
            stack.callback(server.stop)
            server.start()
            server.wait_ready()
            urls[step_time] = f"127.0.0.1:{settings.grpc_port}"
        for _ in range(options.repetitions):
            for step_time, found in figures.items():
                found.append(measure(urls[step_time], options.streams, options.length))
    print(f"{options.streams} streams, a prompt of {options.length} tokens, {options.repetitions} times each; seconds")
    print("prefill_step_time   longest gap of a stream   first token of the long prompt")
    for step_time, found in figures.items():
        gaps, firsts = zip(*found, strict=True)
        print(f"{step_time:17g}   {spread(list(gaps)):>23}   {spread(list(firsts)):>30}")


if __name__ == "__main__":
    main()
