"""False alarms of health checks on a loaded server, and how long they take. `python -m benchmarks.health --minutes 10`.

Requests of mixed lengths keep the server full all the time; every half second the decoder's `health` is asked for, as
`tidewright health` and probes do. A sick answer is a false alarm, for nothing is wrong.
"""

from __future__ import annotations

import argparse
import random
import threading
import time

from tidewright.bench.machine import free_ports
from tidewright.bench.sweep import percentile
from tidewright.bench.targets import TritonTarget, running_server
from tidewright.bench.workloads import Request, token_ids
from tidewright.cache import EMBEDDED_MODEL
from tidewright.config import Settings
from tidewright.launch.control import control
from tidewright.launch.errors import LaunchError
from tidewright.launch.prepare import prepare


def load(grpc_url: str, ids: range, until: float, counts: list[int]) -> None:
    target, rng = TritonTarget(grpc_url), random.Random(0)
    while time.monotonic() < until:
        requests = [Request(rng.choices(ids, k=rng.choice([16, 128, 1024])), rng.randint(1, 64)) for _ in range(48)]
        outcomes = target.run(requests)
        counts[0] += len(outcomes)
        counts[1] += sum(bool(outcome.error) for outcome in outcomes)
    target.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--timeout", type=float, default=5, help="seconds that a check may take")
    options = parser.parse_args()
    http, grpc, metrics = free_ports(3)
    folder = prepare(EMBEDDED_MODEL)
    settings = Settings(http_port=http, grpc_port=grpc, metrics_port=metrics, shutdown_grace=0)
    with running_server(settings, folder) as (server, _):
        until, counts = time.monotonic() + 60 * options.minutes, [0, 0]
        loader = threading.Thread(target=load, args=(f"127.0.0.1:{grpc}", token_ids(folder), until, counts))
        loader.start()
        times, alarms = [], []
        while time.monotonic() < until:
            began = time.monotonic()
            try:
                control(server.http_url, "health", options.timeout)
            except LaunchError as error:
                alarms.append(str(error))
            times.append(1e3 * (time.monotonic() - began))
            time.sleep(0.5)
        loader.join()
    print(
        f"{options.minutes:g} minutes, {counts[0]} requests ({counts[1]} failed), {len(times)} health checks: "
        f"{len(alarms)} false alarms; a check took {percentile(times, 50):.0f} ms (p50), "
        f"{percentile(times, 99):.0f} ms (p99), {max(times):.0f} ms at most"
    )
    for alarm in alarms[:10]:
        print(alarm)


if __name__ == "__main__":
    main()
