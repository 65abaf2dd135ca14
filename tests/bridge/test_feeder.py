"""The feeder against a simulated engine, which dies at any moment or of what it is given."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright.bridge import feeder
from tidewright.bridge.feeder import PROBATION, TRIES, Feeder
from tidewright.bridge.output_sequence import OutputSequence
from tidewright.engine.messages import Abort, AdapterChanged, LoadAdapter, Submit, ToEngine
from tidewright.errors import EngineUnavailableError
from tidewright.schema import SamplingParams


class Simulation:
    """Reads the feeder's notes on the spot. Sequence i of length n generates i, i + 1, …, i + n - 1.

    The engine dies in each step that has a poisonous sequence, before anybody gets a token.
    """

    def __init__(self, lengths: list[int], poison: set[int], tenants: list[str] | None = None) -> None:
        self.lengths, self.poison, self.tenants = lengths, poison, tenants or [""] * len(lengths)
        self.given_up: list[int] = []
        self.done: list[int] = []
        self.deaths = 0
        self.running: dict[int, Any] = {}
        self.accepted_before: dict[int, bool] = {}
        self.loads: list[str] = []
        self.is_gone = False
        """It has died, and nobody has noticed."""
        self.feeder = Feeder(self.send, lambda sequence, error: self.given_up.append(sequence.engine_request_id))
        self.sequences = [self.sequence(number) for number in range(len(lengths))]

    def sequence(self, number: int) -> Any:
        request = SimpleNamespace(
            parsed=SimpleNamespace(
                prompt_token_ids=[1],
                bad_words_ids=[],
                sampling=SamplingParams(seed=1, tenant=self.tenants[number]),
                adapter="",
            ),
            deadline=None,
            trace_id="",
        )
        return SimpleNamespace(
            request=request,
            engine_request_id=number,
            index=0,
            token_ids=[],
            progressed=False,
            accepted=False,
            deaths=0,
            engine_is_done=False,
            given=lambda at: None,
        )

    def send(self, message: ToEngine) -> None:
        if self.is_gone:
            raise EngineUnavailableError("gone")
        if isinstance(message, LoadAdapter):
            self.loads.append(message.name)
        elif isinstance(message, Submit):
            assert message.request_id not in self.running
            assert message.output_token_ids == self.sequences[message.request_id].token_ids
            self.running[message.request_id] = self.sequences[message.request_id]
            self.accepted_before[message.request_id] = message.accepted_before
        else:
            assert isinstance(message, Abort)
            del self.running[message.request_id]

    def read_notes(self) -> None:
        while not self.feeder._notes.empty():
            note = self.feeder._notes.get()
            assert note
            with contextlib.suppress(EngineUnavailableError):  # as in its thread
                note()

    def comes_up(self) -> None:
        self.is_gone = False
        self.feeder.engine_up()
        self.read_notes()

    def dies(self, to_blame: bool = True) -> None:
        self.deaths += 1
        self.running.clear()
        self.feeder.engine_lost(to_blame)
        self.read_notes()

    def submit(self, number: int) -> None:
        self.feeder.submit(self.sequences[number])
        self.read_notes()

    def drop(self, number: int) -> None:
        self.feeder.drop(cast(OutputSequence, self.sequences[number]))
        self.read_notes()

    def step(self) -> None:
        """One step of the engine, with what the bridge does of its outputs."""
        if self.poison & self.running.keys():
            self.dies()
            self.comes_up()
            return
        for number, sequence in list(self.running.items()):
            sequence.token_ids.append(number + len(sequence.token_ids))
            sequence.progressed = True
            if sequence.deaths:
                self.feeder.acquit(sequence)
            if len(sequence.token_ids) == self.lengths[number]:
                del self.running[number]
                sequence.engine_is_done = True
                self.done.append(number)
                self.feeder.drop(sequence)
        self.read_notes()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data())
def test_poison_is_given_up_and_all_others_end_whole(lengths: list[int], data: st.DataObject) -> None:
    numbers = range(len(lengths))
    poison = data.draw(st.sets(st.sampled_from(numbers), max_size=3))
    simulation = Simulation(lengths, poison)
    simulation.comes_up()
    for number in numbers:
        for _ in range(data.draw(st.integers(0, 2))):
            simulation.step()
        simulation.submit(number)
    for _ in range(200):
        simulation.step()
    assert set(simulation.given_up) == poison
    assert set(simulation.given_up) | set(simulation.done) == set(numbers)
    assert len(simulation.given_up) + len(simulation.done) == len(numbers)
    assert not simulation.feeder._sequences
    for number in simulation.done:
        assert simulation.sequences[number].token_ids == list(range(number, number + lengths[number]))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.sets(st.integers(0, 7), min_size=1, max_size=2))
def test_who_comes_before_the_first_death_is_not_blamed_for_poison(lengths: list[int], poison: set[int]) -> None:
    poison &= set(range(len(lengths)))
    simulation = Simulation(lengths, poison)
    for number in range(len(lengths)):
        simulation.submit(number)
    simulation.comes_up()
    for _ in range(200):
        simulation.step()
    assert set(simulation.given_up) == poison
    assert set(simulation.done) == set(range(len(lengths))) - poison
    assert simulation.deaths <= TRIES + len(poison)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.lists(st.integers(1, 5), max_size=8), st.data())
def test_deaths_from_outside_cost_nothing(lengths: list[int], steps: list[int], data: st.DataObject) -> None:
    simulation = Simulation(lengths, set())
    simulation.comes_up()
    dropped = data.draw(st.sets(st.sampled_from(range(len(lengths))), max_size=2))
    for number in range(len(lengths)):
        simulation.submit(number)
    for count in steps:
        for _ in range(count):
            simulation.step()
        simulation.dies()
        for number in dropped - set(simulation.done):
            simulation.drop(number)
        simulation.comes_up()
    for _ in range(40):
        simulation.step()
    assert simulation.given_up == []
    assert set(simulation.done) | dropped == set(range(len(lengths)))
    for number in simulation.done:
        assert simulation.sequences[number].token_ids == list(range(number, number + lengths[number]))


def test_further_poison_of_a_tenant_costs_one_engine_each() -> None:
    """Whatever else that tenant sends meanwhile; and nobody else waits for a trial of it."""
    poison = {0, 4, 8, 12, 16, 20}
    tenants = ["bad" if number % 2 == 0 else f"good {number}" for number in range(24)]
    simulation = Simulation([3] * 24, poison, tenants)
    simulation.comes_up()
    simulation.submit(0)
    while not simulation.given_up:
        simulation.step()
    for number in range(1, 24):
        simulation.submit(number)
        assert number % 2 == 0 or number in simulation.running
        simulation.step()
    for _ in range(60):
        simulation.step()
    assert set(simulation.given_up) == poison
    assert set(simulation.done) == set(range(24)) - poison
    assert simulation.deaths == TRIES + len(poison)


def test_new_poison_is_not_blamed_on_the_one_on_trial() -> None:
    """While suspects are tried, one by one, more poison comes with every step."""
    poison = {1, 3, 4, 5, 6, 7}
    simulation = Simulation([3] * 9, poison, [f"{number}" for number in range(9)])
    simulation.comes_up()
    for number in range(9):
        simulation.submit(number)
        simulation.step()
    for _ in range(60):
        simulation.step()
    assert set(simulation.given_up) == poison
    assert sorted(simulation.done) == [0, 2, 8]


def on_probation(count: int, poison: set[int], bad: int) -> Simulation:
    """The tenant of the first `bad` has just lost number 0; every other has a tenant of its own."""
    tenants = ["bad" if number < bad else f"{number}" for number in range(count)]
    simulation = Simulation([3] * count, {0} | poison, tenants)
    simulation.comes_up()
    simulation.submit(0)
    while not simulation.given_up:
        simulation.step()
    return simulation


def test_poison_beside_the_trial_of_another_tenant_is_found() -> None:
    simulation = on_probation(9, {8}, bad=8)
    deaths = simulation.deaths
    simulation.submit(1)
    simulation.submit(8)
    assert set(simulation.running) == {1, 8}
    for number in range(2, 8):  # there would be one to blame each time
        simulation.step()
        simulation.submit(number)
    for _ in range(60):
        simulation.step()
    assert simulation.given_up == [0, 8]
    assert sorted(simulation.done) == [1, 2, 3, 4, 5, 6, 7]
    assert simulation.deaths - deaths == TRIES + 1


def test_poison_on_trial_is_found_though_others_come_with_every_step() -> None:
    simulation = on_probation(20, {1}, bad=2)
    deaths = simulation.deaths
    for number in range(1, 20):
        simulation.submit(number)
        if number > 1:
            simulation.step()
    for _ in range(60):
        simulation.step()
    assert simulation.given_up == [0, 1]
    assert sorted(simulation.done) == [*range(2, 20)]
    assert simulation.deaths - deaths == TRIES + 1


def test_those_that_had_tokens_are_not_mistaken_for_the_one_on_trial() -> None:
    """Nor it for them: it is tried when they have had a token of the same engine."""
    simulation = on_probation(4, set(), bad=2)
    simulation.lengths = [9] * 4
    simulation.submit(2)
    simulation.step()
    simulation.dies()
    simulation.submit(1)
    simulation.comes_up()
    assert set(simulation.running) == {2}
    simulation.step()
    assert set(simulation.running) == {1, 2}
    simulation.dies()
    assert simulation.given_up == [0, 1]


def test_what_comes_late_to_an_engine_is_marked_as_accepted() -> None:
    simulation = on_probation(6, {2}, bad=3)
    for number in (1, 2, 3):  # 2 waits for the end of the trial of 1
        simulation.submit(number)
    assert simulation.accepted_before == {0: True, 1: False, 3: False}
    simulation.step()
    assert simulation.accepted_before.pop(2)
    simulation.dies(to_blame=False)
    simulation.submit(4)
    simulation.accepted_before.clear()
    simulation.comes_up()
    simulation.submit(5)
    assert simulation.accepted_before == {1: True, 2: True, 3: True, 4: True, 5: False}


def test_probation_ends() -> None:
    count = 2 * PROBATION
    simulation = Simulation([1] * count, {0}, ["bad"] * count)
    simulation.comes_up()
    simulation.submit(0)
    while not simulation.given_up:
        simulation.step()
    for number in range(1, count):
        simulation.submit(number)
        assert len(simulation.running) == 1
    for left in range(PROBATION, 0, -1):
        assert simulation.feeder._probation == {"bad": left}
        simulation.step()
    assert not simulation.feeder._probation


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=10), st.data())
def test_poison_of_tenants_is_given_up_and_all_others_end_whole(tenants: list[str], data: st.DataObject) -> None:
    numbers = range(len(tenants))
    poison = data.draw(st.sets(st.sampled_from(numbers), max_size=4))
    simulation = Simulation([3] * len(tenants), poison, tenants)
    simulation.comes_up()
    for number in numbers:
        for _ in range(data.draw(st.integers(0, 6))):
            simulation.step()
        simulation.submit(number)
    for _ in range(200):
        simulation.step()
    assert set(simulation.given_up) == poison
    assert sorted(simulation.given_up + simulation.done) == [*numbers]
    for number in simulation.done:
        assert simulation.sequences[number].token_ids == list(range(number, number + 3))


def test_tenants_on_probation_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "MOST_ON_PROBATION", 2)
    simulation = Simulation([1] * 4, {0, 1, 2, 3}, ["a", "b", "c", ""])
    simulation.comes_up()
    for number in range(4):
        simulation.submit(number)
        while len(simulation.given_up) == number:
            simulation.step()
    assert [*simulation.feeder._probation] == ["b", "c"]


def test_a_lack_of_memory_blames_nobody() -> None:
    simulation = Simulation([3, 3], set())
    for number in range(2):
        simulation.submit(number)
    for _ in range(3 * TRIES):
        simulation.comes_up()
        assert set(simulation.running) == {0, 1}  # no trials
        simulation.dies(to_blame=False)
    for _ in range(TRIES):
        simulation.comes_up()
        simulation.dies()
    simulation.comes_up()
    assert set(simulation.running) == {0}  # on trial
    simulation.dies(to_blame=False)
    simulation.comes_up()
    for _ in range(10):
        simulation.step()
    assert (simulation.given_up, sorted(simulation.done)) == ([], [0, 1])


def test_a_lack_of_memory_is_no_death_of_those_that_had_come_on() -> None:
    """Or one death more would make suspects of them."""
    simulation = Simulation([9, 9], set())
    for number in range(2):
        simulation.submit(number)
    simulation.comes_up()
    simulation.step()
    simulation.dies(to_blame=False)
    for sequence in simulation.sequences:
        sequence.progressed = False
    for _ in range(TRIES - 1):
        simulation.comes_up()
        assert set(simulation.running) == {0, 1}
        simulation.dies()
    simulation.comes_up()
    assert set(simulation.running) == {0, 1}


def test_an_adapter_is_blamed_only_by_an_engine_that_had_no_sequence() -> None:
    """Else one poison request would cost all that are still being read."""
    simulation = Simulation([3], {0})
    for name in ("a", "b"):
        simulation.feeder.adapters.load(name, "folder", lambda _: None)
    simulation.comes_up()
    for name in ("a", "b"):
        simulation.feeder.adapters.changed(AdapterChanged(name, True))
    simulation.submit(0)
    while not simulation.given_up:
        simulation.step()
    assert simulation.loads[-2:] == ["a", "b"]
    for to_blame in (False, True, True):
        assert set(simulation.feeder.adapters.by_name) == {"a", "b"}
        simulation.dies(to_blame)
        simulation.comes_up()
    assert set(simulation.feeder.adapters.by_name) == {"b"}


def test_an_engine_that_was_dead_before_is_no_death_of_who_comes() -> None:
    simulation = Simulation([1] * 3, set())
    simulation.comes_up()
    for number in range(3):
        simulation.is_gone = True
        simulation.submit(number)
        simulation.dies()
        assert simulation.sequences[number].deaths == 0
        simulation.comes_up()
        simulation.step()
    assert simulation.done == [0, 1, 2]


def test_a_suspect_that_no_engine_got_is_not_given_up() -> None:
    simulation = Simulation([3, 3], {0})
    simulation.comes_up()
    for number in (0, 1):
        simulation.submit(number)
    for _ in range(TRIES):
        simulation.step()  # it dies
    assert list(simulation.running) == [0]  # on trial
    simulation.is_gone = True
    simulation.drop(0)  # its caller hangs up in the moment in which the engine dies: the next one's trial would begin
    simulation.dies()
    simulation.comes_up()
    for _ in range(4):
        simulation.step()
    assert (simulation.given_up, simulation.done) == ([], [1])
