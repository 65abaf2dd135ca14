"""devices/cpu/processor_waits.py: on files as Linux writes them, and on Linux itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tidewright.cores import Quota
from tidewright.devices.cpu.processor_waits import ProcessorWaits


class Tasks:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids: list[int] = []

    def write(self, waited: dict[int, float]) -> None:
        for thread, seconds in waited.items():
            self.write_text(thread, f"123456789 {int(seconds * 1e9)} 7\n")

    def write_text(self, thread: int, text: str) -> None:
        (self.folder / str(thread)).mkdir(exist_ok=True)
        (self.folder / str(thread) / "schedstat").write_text(text)


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path)


def test_it_adds_up_what_the_threads_waited_since_the_last_call(tasks: Tasks) -> None:
    tasks.write({1: 10.0, 2: 20.0, 3: 5.0})
    tasks.ids = [1, 2]
    waits = ProcessorWaits(lambda: tasks.ids, None, tasks.folder)
    assert waits.known
    tasks.write({1: 10.5, 2: 20.25, 3: 50.0})
    assert waits.seconds() == pytest.approx(0.75)
    assert waits.seconds() == 0.0


def test_threads_come_and_go(tasks: Tasks) -> None:
    tasks.write({1: 1.0, 2: 2.0})
    tasks.ids = [1, 2]
    waits = ProcessorWaits(lambda: tasks.ids, None, tasks.folder)
    tasks.write({1: 1.5, 4: 30.0})
    tasks.ids = [1, 4, 5]  # 2 is gone, 5 ended just now
    assert waits.seconds() == pytest.approx(0.5), "what a thread waited before it was seen does not count"
    tasks.write({4: 30.125})
    assert waits.seconds() == pytest.approx(0.125)


def test_a_quota_is_no_neighbour(tasks: Tasks, tmp_path: Path) -> None:
    stat = tmp_path / "cpu.stat"
    stat.write_text("throttled_usec 4000000\n")
    tasks.write({1: 0.0})
    tasks.ids = [1]
    waits = ProcessorWaits(lambda: tasks.ids, Quota(1.5, stat), tasks.folder)
    stat.write_text("throttled_usec 4300000\n")
    tasks.write({1: 0.5})
    assert waits.seconds() == pytest.approx(0.2)
    stat.write_text("throttled_usec 5300000\n")
    assert waits.seconds() == 0.0


@pytest.mark.parametrize("text", ["", "0 0\n", "a b c\n"])
def test_a_kernel_that_does_not_count_is_known(tasks: Tasks, text: str) -> None:
    if text:
        tasks.write_text(1, text)
    assert not ProcessorWaits(lambda: [1], None, tasks.folder).known


def test_linux_counts_a_wait_for_a_core_that_another_process_uses() -> None:
    core = str(min(os.sched_getaffinity(0)))
    busy = subprocess.Popen(
        [sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"],
        stdout=subprocess.PIPE,
    )
    found = []

    def work() -> None:
        os.sched_setaffinity(0, {int(core)})  # of this thread
        waits = ProcessorWaits(lambda: [threading.get_native_id()], None)
        deadline, waited = time.monotonic() + 30, 0.0
        while waited < 0.02 and time.monotonic() < deadline:
            waited += waits.seconds()
        found.append(waited)

    try:
        assert busy.stdout
        busy.stdout.readline()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        busy.kill()
        busy.communicate()
    assert found[0] >= 0.02
