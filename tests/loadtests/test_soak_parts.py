"""The soak's schedule of kills, its verdict and its regression, without servers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import psutil
import pytest

from loadtests.resources import Watch
from loadtests.samples import SILENT, UNENDED
from loadtests.soak import kills
from loadtests.soak.kills import MOST_TRITONS, VICTIMS, WINDOW, Killer, Schedule
from loadtests.soak.verdict import LONG_ENOUGH, unended, verdict


def drawn(seed: int, count: int, every: float) -> list[tuple[float, str, int]]:
    schedule = Schedule(seed, 45.0, 2)
    return [schedule.next(number * every) for number in range(count)]


def test_kills_repeat_with_their_seed_and_hit_everything() -> None:
    assert drawn(1, 50, 60.0) == drawn(1, 50, 60.0) != drawn(2, 50, 60.0)
    found = drawn(0, 400, 600.0)
    assert Counter(victim for _, victim, _ in found).keys() == VICTIMS.keys()
    assert {replica for _, _, replica in found} == {0, 1}
    assert all(22.5 <= pause <= 67.5 for pause, _, _ in found)


def test_no_tritonserver_is_killed_more_often_than_serve_starts_it_again() -> None:
    every = 20.0
    found = [(number * every, what, replica) for number, (_, what, replica) in enumerate(drawn(3, 500, every))]
    heavy = [(at, replica) for at, what, replica in found if what != "engine"]
    for at, replica in heavy:
        assert sum(one == replica and at - WINDOW < then <= at for then, one in heavy) <= MOST_TRITONS


class FakeCluster:
    """One process, which is whole again at once, or never."""

    def __init__(self, returns: bool) -> None:
        self.returns, self.asked = returns, 0
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    def find(self, replica: int, what: str) -> psutil.Process | None:
        return psutil.Process(self.process.pid)

    def wait_whole(self, seconds: float) -> bool:
        self.asked += 1
        return self.returns


@pytest.mark.parametrize("returns", [True, False])
def test_a_kill_is_noted_with_how_long_it_took(monkeypatch: pytest.MonkeyPatch, returns: bool) -> None:
    monkeypatch.setattr(kills, "NOTICED_AFTER", 0.01)
    cluster = FakeCluster(returns)
    said: list[str] = []
    killer = Killer(cluster, Schedule(0, 0.01, 2), said.append)
    killer.start()
    assert cluster.process.wait(30) == -9
    deadline = time.monotonic() + 30
    while not killer.kills:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killer.stop()
    first = killer.kills[0]
    assert first.what in VICTIMS
    assert (first.recovered_after is None) == (not returns)
    assert bool(killer.failure) == (not returns)
    if not returns:
        assert len(killer.kills) == 1  # nothing more is killed
    assert said[0].startswith("killing ")


def process(name: str, mib: float | None, descriptors: float | None, seconds: float = LONG_ENOUGH) -> dict[str, Any]:
    values = {"mib_per_minute": mib, "descriptors_per_minute": descriptors}
    return {"name": name, "pid": 1, "seconds": seconds, **values}


def test_a_verdict_names_each_promise() -> None:
    report = {
        "summary": {"error_rate": 0.0005},
        "errors": {f"{SILENT}60 s": 2, "status 503: busy": 4, UNENDED: 1},
        "kills": [{"recovered_after": 2.0}],
        "processes": [
            process("gateway", 0.05, 0.0),
            process("replica 1: engine", 0.5, 0.2),
            process("replica 1: engine", 9.0, 0.0, seconds=5.0),  # a short life
            process("replica 2: engine", 9.0, 9.0, seconds=5.0),
            process("load generator: locust", 9.0, 9.0),
        ],
    }
    found = {row["promise"]: row["met"] for row in verdict(report, 1.0)}
    assert unended(report["errors"]) == 3  # type: ignore[arg-type]
    assert found == {
        "availability: one token, once a second": True,
        "requests that failed": True,
        "streams without an end": False,
        "replicas that did not come back": True,
        "MiB a minute, gateway (1)": True,
        "descriptors a minute, gateway (1)": True,
        "MiB a minute, replica 1: engine (1)": False,
        "descriptors a minute, replica 1: engine (1)": False,
        "MiB a minute, replica 2: engine (1)": None,
        "descriptors a minute, replica 2: engine (1)": None,
    }
    assert verdict({**report, "kills": [{"recovered_after": None}]}, None)[3]["met"] is False
    assert verdict(report, None)[0]["met"] is None
    assert verdict(report, 0.99)[0]["met"] is False


def test_the_watch_sees_a_process_and_its_children_until_they_end() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        with Watch(lambda: [("ours", parent.pid), ("gone", 2**22 + 1), ("all", os.getpid())], every=0.02) as watch:
            deadline = time.monotonic() + 30
            while sum(name.startswith("ours") and len(points) > 2 for (name, _), points in watch.series.items()) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            for child in psutil.Process(parent.pid).children():
                child.kill()
            parent.wait(30)
    finally:
        parent.kill()
    assert {pid for _, pid in watch.series} >= {parent.pid}
    owners = {pid: name.partition(":")[0] for name, pid in watch.series}
    assert owners[os.getpid()] == "all"
    assert owners[parent.pid] == "ours"
    # Each process once in a round; one that was seen between fork and exec has another name later.
    looks = Counter(pid for (_, pid), points in watch.series.items() for _ in points)
    assert len(looks) == len(owners) >= 3
    assert max(looks.values()) == looks[os.getpid()]
    for points in watch.series.values():
        assert all(point.mib > 0 and point.descriptors > 0 for point in points)
        assert [point.cpu for point in points] == sorted(point.cpu for point in points)
