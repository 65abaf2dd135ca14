"""Measures Tidewright beside transformers on this machine: workloads W1-W4, start time, overhead and memory.

W1 one stream, 128 tokens in, 128 out.  W2 16 requests at once, 128 in, 64 out.
W3 16 at once sharing a prefix of 512 tokens, 16 of their own, 32 out.  W4 one prompt of 1024, 1 out.
Greedy, EOS ignored; token ids are random from a seed, new in each repetition. The systems take turns in each
repetition, so that a slow moment of the machine meets all of them; medians are printed.
"""

from __future__ import annotations

import json
import platform
import random
import socket
import statistics
import sys
import time
from pathlib import Path

import click
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.targets import EngineTarget, Target, Timing, TransformersTarget, TritonTarget, running_server
from tidewright.cache import EMBEDDED_MODEL
from tidewright.config import Settings
from tidewright.launch.prepare import prepare

VOCABULARY = range(100, 49000)  # ordinary tokens of the embedded model
RESULTS = Path(__file__).parent / "results"


def w1(rng: random.Random) -> tuple[list[list[int]], int]:
    return [rng.choices(VOCABULARY, k=128)], 128


def w2(rng: random.Random) -> tuple[list[list[int]], int]:
    return [rng.choices(VOCABULARY, k=128) for _ in range(16)], 64


def w3(rng: random.Random) -> tuple[list[list[int]], int]:
    prefix = rng.choices(VOCABULARY, k=512)
    return [prefix + rng.choices(VOCABULARY, k=16) for _ in range(16)], 32


def w4(rng: random.Random) -> tuple[list[list[int]], int]:
    return [rng.choices(VOCABULARY, k=1024)], 1


# What is read off each workload: label, workload, figure from a timing, whether more is better.
def ttft_ms(t: Timing) -> float:
    return 1000 * statistics.mean(t.first)


def decode_rate(t: Timing) -> float:
    return (t.tokens - 1) / (t.last - t.first[0])


def throughput(t: Timing) -> float:
    return t.tokens / t.last


WORKLOADS = {"W1": w1, "W2": w2, "W3": w3, "W4": w4}
FIGURES = [
    ("W1 TTFT, ms", "W1", ttft_ms, False),
    ("W1 decode, tokens/s", "W1", decode_rate, True),
    ("W2 throughput, tokens/s", "W2", throughput, True),
    ("W2 mean TTFT, ms", "W2", ttft_ms, False),
    ("W3 throughput, tokens/s", "W3", throughput, True),
    ("W3 mean TTFT, ms", "W3", ttft_ms, False),
    ("W4 time, ms", "W4", ttft_ms, False),
]


@click.command(help=__doc__)
@click.option("--repetitions", default=5, show_default=True, help="Runs of each workload on each system.")
@click.option("--starts", default=3, show_default=True, help="Server starts to time.")
@click.option("--model", default=EMBEDDED_MODEL, show_default=True, help="Model to measure.")
def main(repetitions: int, starts: int, model: str) -> None:
    console = Console()
    model_dir = prepare(model)
    settings = Settings(**dict(zip(("http_port", "grpc_port", "metrics_port"), _free_ports(3), strict=True)))
    start_times = []
    for _ in range(starts - 1):
        with running_server(settings, model_dir) as (_, seconds):
            start_times.append(seconds)
    with running_server(settings, model_dir) as (server, seconds):
        start_times.append(seconds)
        engine = EngineTarget(settings, model_dir)
        targets: list[Target] = [
            TritonTarget(f"127.0.0.1:{settings.grpc_port}"),
            engine,
            TransformersTarget(model_dir),
        ]
        timings = _measure(targets, repetitions, console)
        memory = _memory(server.pid or 0)
        load_seconds = engine.ready.load_seconds if engine.ready else float("nan")
        for target in targets:
            target.close()  # type: ignore[attr-defined]
    report = _report(timings, start_times, load_seconds, memory, settings)
    _print(report, console)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json"
    file.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"Written to {file}")


def _measure(targets: list[Target], repetitions: int, console: Console) -> dict[str, dict[str, list[Timing]]]:
    timings: dict[str, dict[str, list[Timing]]] = {w: {t.name: [] for t in targets} for w in WORKLOADS}
    with Progress(console=console) as progress:
        bar = progress.add_task("Measuring", total=(repetitions + 1) * len(WORKLOADS) * len(targets))
        for repetition in range(repetitions + 1):
            if not console.is_terminal:  # where no bar is drawn
                console.print(f"Repetition {repetition} of {repetitions}" + " (warm-up)" * (repetition == 0))
            for name, workload in WORKLOADS.items():
                # Rotated, so that none always runs right after the same other one.
                turn = repetition % len(targets)
                for target in targets[turn:] + targets[:turn]:
                    timing = target.run(*workload(random.Random(f"{repetition} {name}")))
                    progress.advance(bar)
                    if repetition:  # the first is for warming up
                        timings[name][target.name].append(timing)
    return timings


def _report(
    timings: dict[str, dict[str, list[Timing]]],
    start_times: list[float],
    load_seconds: float,
    memory: dict[str, float],
    settings: Settings,
) -> dict:
    def median(workload: str, target: str, figure: object) -> float:
        return statistics.median(figure(t) for t in timings[workload][target])  # type: ignore[operator]

    def seconds_a_token(target: str) -> float:
        return 1 / median("W1", target, decode_rate)

    ours = timings["W2"]["tidewright"]
    return {
        "machine": {"cpu": _cpu_name(), "cores": psutil.cpu_count(), "python": platform.python_version()},
        "dtype": settings.dtype,
        "repetitions": len(ours),
        "figures": {
            label: {target: median(workload, target, figure) for target in timings[workload]}
            for label, workload, figure, _ in FIGURES
        },
        "start": {
            "start to first token through Triton, s": statistics.median(start_times),
            "model load alone, s": load_seconds,
        },
        "overhead of Triton and bridge": {
            "a request (W1 TTFT), ms": median("W1", "tidewright", ttft_ms) - median("W1", "engine alone", ttft_ms),
            "a response (W1 time a token), ms": 1000
            * (seconds_a_token("tidewright") - seconds_a_token("engine alone")),
            "tokens a response (W2)": statistics.median(t.tokens / t.responses for t in ours),
        },
        "memory, MiB (proportional set size)": memory,
    }


def _print(report: dict, console: Console) -> None:
    machine = report["machine"]
    title = f"{machine['cpu']}, {machine['cores']} cores, {report['dtype']}, medians of {report['repetitions']}"
    table = Table(title=title)
    table.add_column("figure")
    targets = list(next(iter(report["figures"].values())))
    for target in targets:
        table.add_column(target, justify="right")
    table.add_column("tidewright is", justify="right")
    more_is_better = {label: more for label, _, _, more in FIGURES}
    for label, values in report["figures"].items():
        ratio = values["tidewright"] / values["transformers"]
        factor = ratio if more_is_better[label] else 1 / ratio
        table.add_row(label, *(f"{values[t]:.0f}" for t in targets), f"{factor:.2f}x transformers")
    console.print(table)
    for heading in ("start", "overhead of Triton and bridge", "memory, MiB (proportional set size)"):
        table = Table("", "", title=heading, show_header=False)
        for label, value in report[heading].items():
            table.add_row(label, f"{value:.2f}")
        console.print(table)


def _memory(pid: int) -> dict[str, float]:
    """Proportional set size of tritonserver and what it started, by what each process is."""
    sizes: dict[str, float] = {}
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        command = " ".join(process.cmdline())
        name = "tritonserver"
        if "tidewright.engine" in command:
            name = "engine"
        elif "python_backend_stub" in command:
            name = "stub of tokenizer" if "tokenizer" in command else "stub of decoder (bridge)"
        sizes[name] = sizes.get(name, 0) + process.memory_full_info().pss / 2**20
    return sizes


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())
