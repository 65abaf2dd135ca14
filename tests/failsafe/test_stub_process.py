"""failsafe/stub_process.py: which process has ended, and what is lost with it. Real processes."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from tidewright.failsafe.stub_process import StubProcess

PATIENCE = 20.0  # seconds


@pytest.fixture
def stub() -> Iterator[StubProcess]:
    made = StubProcess()
    yield made
    made.close()


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    made = [subprocess.Popen(["cat"], stdin=subprocess.PIPE) for _ in range(2)]
    yield made
    for process in made:
        process.kill()
        process.communicate()


def wait(stub: StubProcess, now: float) -> None:
    deadline = time.monotonic() + PATIENCE
    while not stub.look(now):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nothing_is_lost_while_it_lives(stub: StubProcess, processes: list[subprocess.Popen[bytes]]) -> None:
    assert not stub.look(0)
    stub.named(processes[0].pid, 1)
    stub.named(processes[0].pid, 2)
    assert not stub.look(3)
    assert stub.lost_before == -math.inf


def test_a_killed_one_has_died_and_one_that_was_waited_for_has_not(
    stub: StubProcess, processes: list[subprocess.Popen[bytes]]
) -> None:
    first, second = processes
    stub.named(first.pid, 1)
    first.kill()
    wait(stub, 5)
    assert (stub.lost_before, stub.died) == (5, True)
    assert not stub.look(6)
    stub.named(second.pid, 7)
    assert stub.lost_before == 5  # what came between the two is at the second
    second.kill()
    second.wait()  # as Triton does with a stub that it ends
    wait(stub, 8)
    assert (stub.lost_before, stub.died) == (8, False)


def test_one_that_ends_by_itself_has_not_died(stub: StubProcess, processes: list[subprocess.Popen[bytes]]) -> None:
    stub.named(processes[0].pid, 1)
    assert processes[0].stdin
    processes[0].stdin.close()
    wait(stub, 2)
    assert (stub.lost_before, stub.died) == (2, False)


def test_one_that_is_replaced_may_finish_what_it_has(
    stub: StubProcess, processes: list[subprocess.Popen[bytes]]
) -> None:
    first, second = processes
    stub.named(first.pid, 1)
    stub.named(second.pid, 5)
    assert not stub.look(6)
    assert stub.lost_before == -math.inf
    first.kill()
    wait(stub, 9)
    assert stub.lost_before == 5  # what was sent later is at the second


def test_a_system_that_tells_nothing_of_ends(
    stub: StubProcess, processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> int:
        raise OSError("no such call")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    stub.named(processes[0].pid, 1)
    processes[0].kill()
    assert not stub.look(2)
    stub.named(processes[1].pid, 3)
    assert stub.lost_before == 3


def test_no_descriptor_stays(processes: list[subprocess.Popen[bytes]]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    stub = StubProcess()
    for process in processes:
        stub.named(process.pid, 1)
    processes[0].kill()
    wait(stub, 2)
    stub.close()
    assert len(os.listdir("/proc/self/fd")) == before
