"""A whole load test: the target (ours if none is named), the check before, the load, the report."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loadtests import driver, figures, preflight, report, resources
from loadtests.driver import Fleet
from loadtests.options import Options
from loadtests.resources import Watch
from loadtests.servers import serving
from tidewright.bench import machine

WARM_UP = 60.0  # seconds in which a process's memory may grow, or a third of the test if that is less


@contextlib.contextmanager
def target(options: Options) -> Iterator[tuple[Options, list[tuple[str, int]]]]:
    """The options with where it is, and the processes that can be watched."""
    if options.url:
        yield options, []
        return
    print("Starting `tidewright serve` with the embedded model (--url measures a server that runs).", file=sys.stderr)
    with serving() as server:
        yield msgspec.structs.replace(options, url=server.url, grpc=server.grpc_url), [("server", server.pid)]


def run(options: Options, fleet: Fleet, folder: Path, watched: Sequence[int] = ()) -> dict[str, Any]:
    """The report, which is then in the folder.

    Raises:
        TargetError, ServerError, LoadError: it could not run; the message says why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with target(options) as (options, processes):
        options = preflight.check(options)
        roots = [*processes, *((f"process {pid}", pid) for pid in watched), resources.own_family()]
        print(
            f"{options.users} users ({options.shape}), {options.duration:.0f} s, at {options.url or options.grpc}; "
            "Ctrl-C stops and reports.",
            file=sys.stderr,
        )
        with Watch(lambda: roots) as watch:
            result = driver.run(options, fleet, folder)
    made = figures.report(
        result.samples,
        options,
        result.began,
        result.ended,
        interrupted=result.interrupted,
        stopped=result.stopped(options),
        machine=machine.description(),
        processes=resources.figures(watch.series, result.began, min(WARM_UP, options.duration / 3)),
    )
    finish(made, folder)
    return made


def finish(made: dict[str, Any], folder: Path) -> None:
    """Writes the report, and says the most important of it."""
    page, data = report.write(made, folder)
    summary, shown = made["summary"], report.figure
    first, whole = (
        f"p50 {shown(one['p50'])} ms, p99 {shown(one['p99'])} ms" for one in (summary["ttft_ms"], summary["e2e_ms"])
    )
    print(
        f"{summary['requests']} requests, {summary['failed']} failed, {shown(summary['requests_per_second'])}/s; "
        f"TTFT {first}; whole {whole}"
    )
    print(f"Report: {page}\nFigures: {data}", file=sys.stderr)
