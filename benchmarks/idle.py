"""What a server costs that nobody uses, in percent of one core, by process. `python -m benchmarks.idle`.

`tidewright serve` runs with its gateway, without and with a fallback; nobody sends anything. The kernel counts in
hundredths of a second, so a minute shows 0.02 %. Also: what one `tidewright health` takes.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tidewright.bench.machine import free_ports

SETTLE = 20.0  # seconds until the spare engine stands by
RUNS = 10  # of `tidewright health`


def name_of(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    if "python_backend_stub" in command:
        return f"stub of {command.split('/1/model.py')[0].rpartition('/')[2]}"
    known = {"tidewright.engine": "engine, or the one that stands by", "tidewright_gateway": "gateway"}
    known |= {"bin/tritonserver": "tritonserver", "tidewright serve": "serve"}
    return next((name for part, name in known.items() if part in command), command)


def family_of(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [one for one in [root, *root.children(recursive=True)] if one.status() != psutil.STATUS_ZOMBIE]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def health_cost(url: str) -> float:
    """Milliseconds of a processor, the median."""
    costs = []
    for _ in range(RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([tidewright(), "health", "--url", url], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return statistics.median(costs)


def tidewright() -> str:
    return str(Path(sys.executable).with_name("tidewright"))


def measure(seconds: float, *options: str) -> None:
    names = ("http", "grpc", "metrics", "gateway")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    flags = [f"--{name}-port={port}" for name, port in ports.items()]
    serve = subprocess.Popen([tidewright(), "serve", *flags, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert serve.stderr is not None
        if not any("Ctrl-C stops" in line for line in serve.stderr):
            raise SystemExit("the server did not start")
        time.sleep(SETTLE)
        family = family_of(serve.pid)
        before, began = [cpu_seconds(one) for one in family], time.monotonic()
        time.sleep(seconds)
        passed = time.monotonic() - began
        shares = [100 * (cpu_seconds(one) - start) / passed for one, start in zip(family, before, strict=True)]
        url = f"http://127.0.0.1:{ports['http']}"
        print(f"tidewright serve {' '.join(options)}")
        for one, share in zip(family, shares, strict=True):
            print(f"  {name_of(one):36s} {share:5.2f} %")
        print(f"  {'all':36s} {sum(shares):5.2f} %")
        print(f"  one `tidewright health`: {health_cost(url):.0f} ms of a processor")
    finally:
        serve.terminate()
        serve.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    seconds = parser.parse_args().seconds
    measure(seconds)
    measure(seconds, "--fallback", "auto")


if __name__ == "__main__":
    main()
