"""CPU, memory and descriptors of each process while a load test runs, and whether they grow."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import psutil

from tidewright.bench.machine import family, process_name

EVERY = 1.0  # seconds
LOAD_GENERATOR, OWN_PARTS = "load generator", ("locust", "loadtests")
MAX_POINTS = 20_000
"""Of one process, at most; beyond it every second one is dropped and half as many are taken."""
MIN_POINTS = 10  # for a regression


class Point(NamedTuple):
    at: float  # seconds since the epoch
    cpu: float  # seconds of it used so far
    mib: float  # of its own (USS)
    descriptors: int


class Watch:
    """Looks at processes in a thread of its own. `roots`: name and pid, each with its children.

    A process belongs to the first root that has it. Below the load generator only its own parts are looked at: servers
    that it started are roots as well.
    """

    def __init__(self, roots: Callable[[], Iterable[tuple[str, int]]], every: float = EVERY) -> None:
        self._roots, self._every = roots, every
        self.series: dict[tuple[str, int], list[Point]] = {}
        """By name and pid: a process that was started again is another one."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="resources", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._over.is_set():
            began, seen = time.monotonic(), set[int]()
            for root, pid in self._roots():
                with contextlib.suppress(psutil.Error):
                    for process in family(pid):
                        if process.pid not in seen:
                            seen.add(process.pid)
                            self._look(root, process)
            self._over.wait(max(0.0, self._every - (time.monotonic() - began)))

    def _look(self, root: str, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error):
            part = process_name(process)
            if process.status() == psutil.STATUS_ZOMBIE or (root == LOAD_GENERATOR and part not in OWN_PARTS):
                return
            cpu, own, descriptors = process.cpu_times(), process.memory_full_info().uss, process.num_fds()
            if not own or not descriptors:
                return  # it is just ending
            point = Point(time.time(), cpu.user + cpu.system, own / 2**20, descriptors)
            series = self.series.setdefault((f"{root}: {part}", process.pid), [])
            series.append(point)
            if len(series) > MAX_POINTS:
                del series[::2]


def growth(series: Sequence[Point], warm_up: float) -> dict[str, float | None]:
    """A minute, by linear regression over what comes `warm_up` seconds after the process began to be seen."""
    points = [point for point in series if point.at >= series[0].at + warm_up]
    if len(points) < MIN_POINTS:
        return {"mib_per_minute": None, "descriptors_per_minute": None}
    minutes = np.array([point.at for point in points]) / 60
    minutes -= minutes[0]
    mib, _ = np.polyfit(minutes, [point.mib for point in points], 1)
    descriptors, _ = np.polyfit(minutes, [point.descriptors for point in points], 1)
    return {"mib_per_minute": round(float(mib), 4), "descriptors_per_minute": round(float(descriptors), 4)}


def figures(series: dict[tuple[str, int], list[Point]], began: float, warm_up: float) -> list[dict[str, Any]]:
    """Of each process, for the report; `began` is where its times start."""
    found = []
    for (name, pid), points in sorted(series.items()):
        times = [point.at for point in points]
        cpu = [0.0, *np.diff([p.cpu for p in points]) / np.maximum(np.diff(times), 1e-3)] if len(points) > 1 else [0.0]
        thin = slice(None, None, max(1, len(points) // 300))
        found.append(
            {
                "name": name,
                "pid": pid,
                "seconds": round(times[-1] - times[0], 1),
                "cpu_seconds": round(points[-1].cpu - points[0].cpu, 2),
                "mib_first": round(points[0].mib, 2),
                "mib_last": round(points[-1].mib, 2),
                "descriptors_first": points[0].descriptors,
                "descriptors_last": points[-1].descriptors,
                **growth(points, warm_up),
                "at": [round(at - began, 1) for at in times[thin]],
                "cpu": [round(float(share), 3) for share in cpu[thin]],
                "mib": [round(point.mib, 1) for point in points[thin]],
            }
        )
    return found


def own_family() -> tuple[str, int]:
    """The load generator: it shares the cores with what it measures."""
    return LOAD_GENERATOR, os.getpid()
