"""What the engine does on a GPU, in a few minutes: `benchmarks/gpu.sh` installs what is needed and calls this.

Parts, each in a process of its own and with a time limit, so that one that fails or hangs leaves the others:

- correctness: the tests of the GPU's kernels, with the real compiler, and of whole engines on the GPU;
- 135M: a model with its weights in an engine process, as it is served: the workloads of `tidewright bench`, and 1000
  requests a second that ask for 16 tokens each. Triton, the bridge and the gateway are left out: what they add does
  not depend on the GPU, and one Python client could not tell it from its own time. Without the model: random weights,
  and an engine in the client's process;
- products: those with quantized weights beside torch's in 16 bits, kernel by kernel (gpu_products.py);
- 1B, 8B: random weights of these shapes, in this process: the same workloads, and the share of the memory bandwidth in
  decode. Bytes are those that the step's kernels must move by their shapes (devices/cuda/traffic.py), and the
  bandwidth is that of a copy on this GPU, measured before. Steps are launched one ahead of the host, and their time is
  that of the whole step.

The folder of --out gets gpu.json, gpu.txt (the table) and a log of each part. The exit status is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMITS = {"correctness": 130, "products": 45, "135M": 80, "1B": 60, "8B": 75}
"""Seconds of each part, at most; a part takes less if less is left of --seconds."""
LEAST = 10  # seconds; with less left, a part is not begun
CARD_TESTS = ("tests/devices/cuda", "tests/engine/test_engine_cuda.py")
DRY_TESTS = ("tests/devices/cuda/test_traffic.py",)
NEED_NO_CARD = ("tests/devices/cuda/test_compile_ahead.py",)


@dataclass
class Part:
    """`figures`: what gpu_parts.py wrote, up to where it came."""

    problem: str = ""
    seconds: float = 0.0
    figures: list[dict[str, Any]] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="folder for results")
    parser.add_argument("--seconds", type=float, default=sum(LIMITS.values()), help="for all parts together")
    parser.add_argument("--parts", nargs="+", default=[*LIMITS], choices=[*LIMITS])
    parser.add_argument("--model", default="", help="folder or prepared name; default: benchmarks/model, or the cache")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: shows that the parts run")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    parts: dict[str, Part] = {}
    for name in options.parts:
        left = min(LIMITS[name], deadline - time.monotonic())
        print(f"{name}: up to {left:.0f} s", flush=True)
        run = _tests if name == "correctness" else _measurements
        parts[name] = run(name, left, options) if left >= LEAST else Part(f"not begun: {left:.0f} s are left")
        _write(parts, options)
    print((options.out / "gpu.txt").read_text())
    return int(any(part.problem for part in parts.values()))


def _tests(name: str, limit: float, options: argparse.Namespace) -> Part:
    report = options.out / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += DRY_TESTS if options.dry_run else CARD_TESTS
    command += [f"--ignore={path}" for path in NEED_NO_CARD]
    if find_spec("xdist") and not options.dry_run:
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    part = _run(name, command, limit, options)
    if report.is_file():
        cases = ElementTree.parse(report).findall(".//testcase")
        failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        skipped = sum(case.find("skipped") is not None for case in cases)
        counts = {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped}
        part.figures = [{"label": f"tests {what}", "value": count} for what, count in counts.items()]
        if failed:
            part.problem = "failed: " + ", ".join(str(case.get("name")) for case in failed[:5])
    return part


def _measurements(name: str, limit: float, options: argparse.Namespace) -> Part:
    figures = options.out / f"{name}.json"
    figures.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_parts", name, str(figures), "--model", options.model]
    if name == "products":
        command = [sys.executable, "-m", "benchmarks.gpu_products", str(figures)]
    part = _run(name, command + ["--dry-run"] * options.dry_run, limit, options)
    if figures.is_file():
        part.figures = json.loads(figures.read_text())
    return part


def _run(name: str, command: list[str], limit: float, options: argparse.Namespace) -> Part:
    """In a process group of its own, which ends with it, and its output in a log."""
    log, began = options.out / f"{name}.log", time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    problem = "" if code == 0 else f"not done after {limit:.0f} s" if code is None else f"exit status {code}"
    if problem and lines:
        problem += f": {lines[-1][:200]}"
    return Part(problem, time.monotonic() - began)


def _write(parts: dict[str, Part], options: argparse.Namespace) -> None:
    made = {"dry run": options.dry_run, "parts": {name: asdict(part) for name, part in parts.items()}}
    (options.out / "gpu.json").write_text(json.dumps(made, indent=1) + "\n")
    (options.out / "gpu.txt").write_text(table(parts, options.dry_run))


def table(parts: dict[str, Part], is_dry: bool) -> str:
    lines = ["A dry run on the CPU with tiny shapes: the figures mean nothing.", ""] if is_dry else []
    for name, part in parts.items():
        lines.append(f"{name} ({part.seconds:.0f} s)" + (f"  PROBLEM {part.problem}" if part.problem else ""))
        for figure in part.figures:
            value = figure["value"]
            shown = value if isinstance(value, str) else f"{value:,.{0 if value >= 100 or value == int(value) else 2}f}"
            goal = f"  goal {figure['goal']}: {'met' if figure['met'] else 'MISSED'}" if "goal" in figure else ""
            lines.append(f"  {figure['label']:58} {shown:>12} {figure.get('unit', '')}{goal}".rstrip())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
