"""devices/cpu/thread_count.py against a simulated machine: neighbours that want cores, and threads that share them."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tidewright.devices.cpu.thread_count import LONGEST_HOLD, PATIENCE, ThreadCount

WINDOW = 0.1


class Machine:
    """`cores`, of which others keep some busy. A thread beside a busy neighbour waits half of the time."""

    def __init__(self, cores: int) -> None:
        self.cores, self.now = cores, 0.0
        self.count = ThreadCount(cores)

    def run(self, windows: int, busy: float) -> list[int]:
        numbers = []
        for _ in range(windows):
            numbers.append(self.count.current)
            shared = min(max(0.0, self.count.current + busy - self.cores), self.count.current)
            self.now += WINDOW
            self.count.observe(self.now, WINDOW, waited=WINDOW * shared / 2)
        return numbers


def test_alone_it_keeps_all_cores() -> None:
    assert set(Machine(8).run(1000, busy=0)) == {8}


def test_a_short_disturbance_changes_nothing() -> None:
    machine = Machine(2)
    for _ in range(20):
        assert set(machine.run(PATIENCE - 1, busy=1) + machine.run(1, busy=0)) == {2}


def test_what_a_server_beside_the_engine_takes_changes_nothing() -> None:
    """Triton and the bridge: a seventh of a core."""
    assert set(Machine(2).run(1000, busy=0.15)) == {2}


def test_a_busy_core_is_left_to_its_neighbour_and_taken_back() -> None:
    machine = Machine(2)
    assert machine.run(PATIENCE + 1, busy=1)[-1] == 1
    assert machine.count.settled == 1
    machine.run(int(2 * LONGEST_HOLD / WINDOW), busy=0)
    assert machine.count.settled == machine.count.current == 2


def test_it_tries_less_and_less_often() -> None:
    machine = Machine(2)
    machine.run(PATIENCE, busy=1)
    holds = []
    for _ in range(9):
        began = machine.now
        while machine.count.current == 1:
            machine.run(1, busy=1)
        holds.append(machine.now - began)
        machine.run(1, busy=1)
        assert machine.count.current == 1, "a trial that fails ends with its window"
    assert holds == pytest.approx([0.25, 0.5, 1, 2, 4, 8, 16, LONGEST_HOLD, LONGEST_HOLD], abs=2 * WINDOW)
    assert machine.run(10_000, busy=1).count(2) < 50


def test_one_thread_that_waits_is_not_made_two() -> None:
    machine = Machine(2)
    assert set(machine.run(2000, busy=3)[PATIENCE:]) == {1}


@settings(max_examples=30)
@given(st.integers(2, 64), st.data())
def test_it_finds_the_free_cores_of_any_machine(cores: int, data: st.DataObject) -> None:
    """And never leaves 1 to `cores`, whatever happens."""
    machine = Machine(cores)
    for busy in data.draw(st.lists(st.integers(0, cores + 3), min_size=1, max_size=4)):
        numbers = machine.run(1200, busy)
        assert all(1 <= number <= cores for number in numbers)
        assert machine.count.settled == max(1, cores - busy)


@settings(max_examples=30)
@example([(5e-324, 1.0)] * 4, 4)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1000)), max_size=200), st.integers(1, 8))
def test_any_figures_leave_a_number_in_its_limits(windows: list[tuple[float, float]], most: int) -> None:
    count, now = ThreadCount(most), 0.0
    for seconds, waited in windows:
        now += seconds
        count.observe(now, seconds, waited)
        assert 1 <= count.settled <= count.current <= min(most, count.settled + 1)
