"""Two revisions of the engine in turns: `python -m benchmarks.revisions REV_A REV_B`; wants an otherwise idle machine.

A revision is a commit, or a folder with a checkout (`.`: as it is now). Each has an engine process and a client of its
own, without Triton. In each round they run the same workloads of `tidewright bench`, W1 to W4, one after the other and
the first in turn, after one round for warming up. Printed are each figure's median, and the ratio of B to A: the median
of the rounds' ratios with the lowest and the highest, where above 1 means that B is better. Run a revision against
itself to see what the noise is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("backends", "gateway", "clients/python/src")
WORKLOADS = ("W1", "W2", "W3", "W4")
PAUSE = 0.3  # seconds between two turns: threads of the one that ran last still look for work


class Revision:
    """A process that runs workloads on the engine of a checkout (`_serve`)."""

    def __init__(self, checkout: Path, options: Sequence[str]) -> None:
        path = os.pathsep.join(str(checkout / package) for package in PACKAGES)
        command = [sys.executable, "-m", "benchmarks.revisions", "--serve", str(checkout), *options]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._hear()  # that it is ready

    def run(self, workload: str, number: int) -> dict[str, float]:
        assert self._process.stdin
        print(workload, number, file=self._process.stdin, flush=True)
        return self._hear()

    def _hear(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("an engine ended; what it said is above")
        heard: dict[str, float] = json.loads(line)
        return heard

    def close(self) -> None:
        self._process.communicate(timeout=60)  # the end of its input is the end


def _serve(checkout: str, model: str, threads: int) -> None:
    """Reads a workload and a number from each line, and answers with the figures of its run."""
    from tidewright import bench
    from tidewright.bench.compare import FIGURES
    from tidewright.bench.targets import EngineTarget
    from tidewright.bench.workloads import WORKLOADS as KNOWN
    from tidewright.bench.workloads import Run, token_ids
    from tidewright.config import Settings
    from tidewright.launch.prepare import prepare

    assert Path(str(bench.__file__)).is_relative_to(checkout), f"{bench.__file__} is not of {checkout}"
    answers, sys.stdout = sys.stdout, sys.stderr
    folder = prepare(model)
    target = EngineTarget(Settings(threads=threads, kv_cache_memory="512MiB"), folder)
    print("{}", file=answers, flush=True)
    try:
        for line in sys.stdin:
            workload, number = line.split()
            requests = KNOWN[workload].requests(random.Random(f"{number} {workload}"), token_ids(folder))
            run = Run.of(requests, target.run(requests))
            figures = {label: figure(run) for label, name, figure, _ in FIGURES if name == workload}
            print(json.dumps(figures), file=answers, flush=True)
    finally:
        target.close()


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The folder that is named, or the packages of a commit in a temporary one."""
    if Path(revision).is_dir():
        yield Path(revision).resolve()
        return
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", revision, *PACKAGES]
    archive = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder).resolve()


def measure(names: Sequence[str], rounds: int, workloads: Sequence[str], options: Sequence[str]) -> list[dict]:
    """By revision: each figure's values, round by round."""
    found: list[dict[str, list[float]]] = [{}, {}]
    with contextlib.ExitStack() as stack:
        revisions = [Revision(stack.enter_context(checkout(name)), options) for name in names]
        for revision in revisions:
            stack.callback(revision.close)
        for number in range(rounds + 1):
            for workload in workloads:
                for turn in (0, 1) if number % 2 else (1, 0):
                    time.sleep(PAUSE)
                    figures = revisions[turn].run(workload, number)
                    for label, value in figures.items() if number else ():
                        found[turn].setdefault(label, []).append(value)
            print(f"round {number} of {rounds}" + " (warm-up)" * (number == 0), file=sys.stderr, flush=True)
    return found


def table(names: Sequence[str], found: Sequence[dict[str, list[float]]]) -> str:
    title = f"median of {len(next(iter(found[0].values())))} rounds"
    lines = [f"{title:26}{names[0]:>12}{names[1]:>12}   B/A"]
    for label, before in found[0].items():
        after = found[1][label]
        more_is_better = label.endswith("tokens/s")
        ratios = [b / a if more_is_better else a / b for a, b in zip(before, after, strict=True)]
        middle = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
        lines.append(f"{label:26}{statistics.median(before):12.1f}{statistics.median(after):12.1f}   {middle}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", metavar="REV", help="two: A, B")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--model", default="smollm2-135m", help="as given to `tidewright serve`")
    parser.add_argument("--threads", type=int, default=0, help="of each engine; default: what it takes by itself")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve, options.model, options.threads)
        return
    if len(options.revisions) != 2:
        parser.error("name two revisions")
    passed_on = ["--model", options.model, "--threads", str(options.threads)]
    print(table(options.revisions, measure(options.revisions, options.rounds, options.workloads, passed_on)))


if __name__ == "__main__":
    main()
