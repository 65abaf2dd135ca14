"""Work of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tidewright.bridge.liveness import Work


@contextmanager
def process(script: str) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{script}"], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        started.stdout.readline()
        yield started.pid
        started.kill()


def settled(work: Work) -> bool:
    """The kernel may count what was done before a little later."""
    time.sleep(0.1)
    work.went_on()
    time.sleep(0.1)
    return work.went_on()


def test_one_that_computes_works_until_it_is_stopped() -> None:
    with process("while True: pass") as pid:
        work = Work(pid)
        for _ in range(3):
            time.sleep(0.05)
            assert work.went_on()
        os.kill(pid, signal.SIGSTOP)
        assert not settled(work)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)
        assert work.went_on()


@pytest.mark.parametrize("script", ["input()", "import time; time.sleep(60)"])
def test_one_that_waits_does_not(script: str) -> None:
    with process(script) as pid:
        assert not settled(Work(pid))


def test_one_that_is_gone_does_not() -> None:
    with process("pass") as pid:
        work = Work(pid)
    assert not work.went_on()
