"""loadtests/driver.py: what the line of progress says, and what becomes of locust."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import pytest

from loadtests import cli, driver
from loadtests.driver import Fleet, LoadError, Result, Run, progress
from loadtests.options import Options
from loadtests.samples import Sample


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        ({"requests": 0, "duration": 60.0}, "    0 of 60 s  4 users  1 requests  0.1/s"),
        ({"requests": 40, "duration": 3600.0}, "    0 s  4 users  1 requests of 40  0.1/s"),
    ],
)
def test_progress_says_what_ends_the_test(options: dict[str, Any], begins: str) -> None:
    """Also when the clocks of the workers, which date the samples, are ahead."""
    sample = Sample(time.time() + 5.0, "http", "chat", "", 10, 10, 0.2, 0.4, 0.1)
    run = SimpleNamespace(samples=[sample], options=SimpleNamespace(shape="steady", users=4, **options))
    assert progress(cast("Run", run)).startswith(begins)


def test_progress_counts_all_of_the_last_ten_seconds() -> None:
    now = time.time()
    old, new = (Sample(now + age, "http", "chat", "", 10, 10, 0.2, 0.4, 0.1) for age in (-100.0, 60.0))  # for good
    samples = [old] * 100 + [new] * 6000
    run = SimpleNamespace(samples=samples, options=SimpleNamespace(shape="steady", users=4, requests=0, duration=600.0))
    assert "  6100 requests  600.0/s" in progress(cast("Run", run))


SAMPLE = Sample(0.0, "http", "chat", "", 10, 10, 0.2, 0.4, 0.1)


@pytest.mark.parametrize(
    ("ran", "more", "says"),
    [
        (61.0, {}, ""),
        (20.0, {"interrupted": True}, ""),
        (20.0, {"status": -9}, "Stopped: locust ended by itself after 20 of 60 s, with the status -9"),
        (20.0, {"words": "a\nMemoryError\n"}, "MemoryError"),
        (40.0, {"words": "x\nStopped: every request failed\ny"}, "Stopped: every request failed"),
        (20.0, {"requests": 2}, ""),
        (20.0, {"requests": 3}, "Stopped: locust ended by itself"),
    ],
)
def test_a_test_that_locust_did_not_end_as_it_should_is_called_so(ran: float, more: dict[str, Any], says: str) -> None:
    """Its figures may be good ones: of the first minute of an hour."""
    values = {"interrupted": False, "status": 0, "words": "", "requests": 0} | more
    options = Options(duration=60.0, requests=values.pop("requests"))
    found = Result([SAMPLE, SAMPLE], 0.0, ran, ran=ran, **values).stopped(options)
    assert (says in found) if says else not found


def test_locust_does_not_outlive_a_failure_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a terminal that is gone: it would load the server to the end of the test, with nobody there."""
    started: list[Run] = []

    def broken(run: Run) -> str:
        started.append(run)
        raise BrokenPipeError

    monkeypatch.setattr(driver, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(driver, "PROGRESS_EVERY", 0.0)
    monkeypatch.setattr(driver, "progress", broken)
    with pytest.raises(BrokenPipeError):
        driver.run(Options(), Fleet(), tmp_path)
    assert started[0].process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("ignored", [False, True])
def test_the_end_of_a_terminal_ends_the_test(ignored: bool) -> None:
    """But for nohup, which has the signal ignored."""
    code = f"""
import os, signal
from click.testing import CliRunner
signal.signal(signal.SIGHUP, signal.{"SIG_IGN" if ignored else "SIG_DFL"})
from loadtests.cli import main
CliRunner().invoke(main, ["run", "--compare", "/none", "/none"])
try:
    os.kill(os.getpid(), signal.SIGHUP)
    print("goes on")
except KeyboardInterrupt:
    print("ends")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ("goes on" if ignored else "ends")


def test_a_server_that_closes_connections_is_no_fault_of_ours() -> None:
    """In a process of its own: locust patches what it is imported into."""
    code = """
import random
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError
from loadtests.lengths import Lengths
from loadtests.options import Options
from loadtests.users.base import RequestError, Tokens, Wanted
from loadtests.users.http import HttpCaller

def gone(*_):
    raise error

caller = HttpCaller(Options())
for error in (HTTPConnectionClosed("connection closed."), HTTPParseError("no head")):
    caller._client.request = gone
    try:
        caller.call(Wanted(random.Random(0), Lengths("chat", 5, 5), "", 0), Tokens())
    except RequestError as problem:
        print(problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["connection: connection closed.", "connection: no head"], done.stderr


@pytest.mark.parametrize("text", ["128", "128:x", "128:x:64", "128:64:", "0:5", ":", "9" * 5000 + ":1", "-1:5"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match="must be like 128:64"):
        cli.lengths_of(text)
    assert cli.lengths_of("128:64") == (128, 64)


def test_without_locust_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in an environment that only `make serve` has set up."""
    monkeypatch.setattr(driver, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match="`make loadtest` installs it"):
        driver.run(Options(), Fleet(), tmp_path)
