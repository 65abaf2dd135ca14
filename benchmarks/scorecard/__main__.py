"""Writes docs/scorecard.md, after it ran benchmarks if asked to. `python -m benchmarks.scorecard`, or `make scorecard`.

Without --run it takes the figures that were measured last (benchmarks/scorecard/scores.yaml). What a benchmark prints
is kept in the folder given by --outputs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.scorecard.criteria import SCORES, Criteria, Score, load_criteria, load_scores, save_scores
from benchmarks.scorecard.page import page
from tidewright.bench.machine import description
from tidewright.cache import cache_dir

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scorecard.md"
ENDS_WITHIN = 15.0  # seconds, after Ctrl-C
console = Console(stderr=True, highlight=False)


def main() -> None:
    criteria = load_criteria()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", metavar="NAME,...", default="", help="benchmarks to run first, or all")
    parser.add_argument("--list", action="store_true", help="show the benchmarks, and end")
    parser.add_argument("--outputs", type=Path, default=cache_dir() / "scorecard", help="where their outputs are kept")
    options = parser.parse_args()
    if options.list:
        return show(criteria)
    chosen = list(criteria.benchmarks) if options.run == "all" else [one for one in options.run.split(",") if one]
    if unknown := [name for name in chosen if name not in criteria.benchmarks]:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(criteria.benchmarks)}")
    failed = [name for name in chosen if not run(name, criteria, options.outputs)]
    scores = load_scores()
    PAGE.write_text(page(criteria, scores))
    console.print(f"{PAGE.relative_to(ROOT)}: {len(scores)} figures")
    if failed:
        sys.exit(f"failed, and their figures stand as they were: {', '.join(failed)}")


def show(criteria: Criteria) -> None:
    table = Table("name", "minutes", "command", "needs", box=None)
    for name, one in criteria.benchmarks.items():
        table.add_row(name, f"{one.minutes:g}", one.command, one.needs)
    Console(highlight=False).print(table)


def run(name: str, criteria: Criteria, outputs: Path) -> bool:
    """Keeps the figures that its output has at once, so that a later one's end costs nothing. False: it failed."""
    benchmark = criteria.benchmarks[name]
    outputs.mkdir(parents=True, exist_ok=True)
    file = outputs / f"{name}.txt"
    began = time.monotonic()
    with console.status(f"{name}: {benchmark.command} (about {benchmark.minutes:g} minutes; output in {file})"):
        status = finished(benchmark.command, file)
    text = file.read_text(errors="replace")
    if status:
        console.print(f"{name}: ended with {status} after {time.monotonic() - began:.0f} s; the end of {file}:")
        console.print("\n".join(text.splitlines()[-5:]), markup=False)
        return False
    scores, machine = load_scores(), machine_name()
    for key, figure in criteria.figures.items():
        if figure.benchmark != name or not figure.find:
            continue
        value = figure.read(text)
        if value is None:
            console.print(f"{name}: its output does not say {key} ({figure.what}); see {file}")
            status = 1
        else:
            scores[key] = Score(value=value, day=date.today(), machine=machine)
            verdict = {None: "", True: "met", False: "missed"}[figure.is_met(value)]
            console.print(f"{name}: {figure.what}: {value:g} {figure.unit}  {verdict}")
    save_scores(scores, SCORES)
    return not status


def finished(command: str, file: Path) -> int:
    """Its exit status. Ctrl-C ends it, and lets it end what it started."""
    ours = {"python": sys.executable, "tidewright": str(Path(sys.executable).with_name("tidewright"))}
    program, *words = shlex.split(command)
    with file.open("wb") as output:
        process = subprocess.Popen(
            [ours.get(program, program), *words],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)
                process.wait(ENDS_WITHIN)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def machine_name() -> str:
    found = description()
    return f"{found['cores']} cores, {found['cpu']}"


if __name__ == "__main__":
    main()
