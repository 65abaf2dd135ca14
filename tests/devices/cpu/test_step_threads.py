"""devices/cpu/step_threads.py: how many threads torch and the kernels get; results do not depend on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import engine_config, logits, prompt, save
from helpers.families import FAMILIES
from tidewright.cores import usable_threads
from tidewright.devices.cpu import step_threads
from tidewright.devices.cpu.kernels import thread_ids
from tidewright.devices.cpu.step_threads import WINDOW, StepThreads, processor_waits, set_threads
from tidewright.devices.cpu.thread_count import LONGEST_HOLD, PATIENCE
from tidewright.engine.model_runner import ModelRunner


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class FakeWaits:
    """For `share` of the time, whether there are steps or not."""

    def __init__(self, clock: Clock) -> None:
        self.calls = 0
        self._clock, self._share, self._last, self._waited = clock, 0.0, 0.0, 0.0

    @property
    def share(self) -> float:
        return self._share

    @share.setter
    def share(self, share: float) -> None:
        self._pass()
        self._share = share

    def _pass(self) -> None:
        self._waited += self._share * (self._clock.now - self._last)
        self._last = self._clock.now

    def seconds(self) -> float:
        self.calls += 1
        self._pass()
        waited, self._waited = self._waited, 0.0
        return waited


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_threads, "time", clock)
    return clock


def run(threads: StepThreads, clock: Clock, seconds: float, step: float = WINDOW / 4) -> None:
    end = clock.now + seconds
    while clock.now < end:
        with threads.step():
            clock.now += step


def test_it_yields_cores_and_takes_them_back(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, step_threads.__name__)
    waits = FakeWaits(clock)
    threads = StepThreads(set_threads(3, 1), waits)
    run(threads, clock, 5.0, step=WINDOW / 100)
    assert (torch.get_num_threads(), caplog.messages) == (3, [])
    assert 300 < waits.calls <= 50 / WINDOW, "not at each step"
    waits.share = 1.0
    run(threads, clock, WINDOW * (PATIENCE + 1))
    assert torch.get_num_threads() == 2
    assert caplog.messages == ["other processes use the cores: steps compute with 2 of 3 threads"]
    waits.share = 0.1
    run(threads, clock, LONGEST_HOLD)
    assert torch.get_num_threads() == 3
    assert caplog.messages[1:] == ["other processes leave the cores: steps compute with 3 of 3 threads"]


def test_trials_that_fail_are_not_logged(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, step_threads.__name__)
    waits = FakeWaits(clock)
    threads = StepThreads(set_threads(2, 1), waits)
    numbers = []
    for _ in range(2400):
        waits.share = 0.5 if torch.get_num_threads() == 2 else 0.0
        run(threads, clock, WINDOW / 4)
        numbers.append(torch.get_num_threads())
    assert 2 in numbers[10:]
    assert len(caplog.messages) == 1


def test_idle_time_is_no_time_of_steps(clock: Clock) -> None:
    waits = FakeWaits(clock)
    threads = StepThreads(set_threads(2, 1), waits)

    def run_now_and_then(in_steps: float, between: float) -> None:
        for _ in range(20 * PATIENCE):
            waits.share = in_steps
            with threads.step():
                clock.now += WINDOW / 5
            waits.share = between
            clock.now += 10.0

    run_now_and_then(in_steps=0.0, between=1.0)
    assert torch.get_num_threads() == 2
    run_now_and_then(in_steps=0.5, between=0.0)
    assert torch.get_num_threads() == 1
    run_now_and_then(in_steps=0.0, between=1.0)
    assert torch.get_num_threads() == 2


def test_what_was_asked_for_is_what_there_is() -> None:
    assert set_threads(5, sharers=2) == torch.get_num_threads() == 5
    torch.set_num_threads(1000)
    assert set_threads(0, sharers=1) == torch.get_num_threads() == usable_threads()
    torch.set_num_threads(1000)
    assert set_threads(0, sharers=1000) == torch.get_num_threads() == 1
    assert set_threads(0, sharers=1) == 1, "OMP_NUM_THREADS, and what torch thinks good, are no less than the cores"


def test_linux_tells_how_long_the_kernels_threads_waited() -> None:
    torch.set_num_threads(3)
    assert len(set(thread_ids())) == 3
    waits = processor_waits()
    assert waits
    assert waits.seconds() >= 0.0


@pytest.mark.parametrize("asked", [0, 3])
def test_a_step_judges_its_threads_unless_their_number_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    save(tmp_path, FAMILIES["llama, tied"])
    made: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        "tidewright.devices.registry.StepThreads", lambda most, waits: made.append((most, waits is not None))
    )
    ModelRunner(engine_config(tmp_path, threads=asked))
    assert made == [(asked or 1, not asked)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_do_not_depend_on_the_number_of_threads(tmp_path: Path, dtype: str) -> None:
    save(tmp_path, FAMILIES["llama, tied"])
    runner = ModelRunner(engine_config(tmp_path, dtype=dtype))
    ids = prompt(60, seed=1)
    wanted_TV = logits(runner, ids, chunk=7)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(logits(runner, ids, chunk=7), wanted_TV)
