"""Admission on a machine of synthetic speed: whom it refuses, and what it learns. The scheduler is the oracle."""

from __future__ import annotations

import contextlib
import math
import random
from typing import Any, NoReturn

import pytest

from helpers.scheduling import make, result
from tidewright.engine import admission as admission_module
from tidewright.engine.admission import Admission
from tidewright.engine.engine import make_sequence
from tidewright.engine.latency import LatencyController
from tidewright.engine.limits import RequestRefusedError
from tidewright.engine.messages import Submit
from tidewright.engine.prediction import Backlog, Work, seconds_to_first_token
from tidewright.engine.step_cost import StepLoad
from tidewright.engine.targets import Targets
from tidewright.resilience.errors import ModelError
from tidewright.schema import SamplingParams

BASE, STREAM, TOKEN, CONTEXT = 0.01, 0.001, 0.0005, 1e-7
MEASURED = 40  # steps


class Machine:
    """An engine without a model, on a clock of its own."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, ttft_target: float = 0.0, class_targets: str = "", **changes: Any
    ) -> None:
        values = {"max_running": 8, "max_waiting": 1000, "max_batched_tokens": 256, "max_model_len": 2000}
        self.scheduler, _ = make(**{"blocks": 4000, **values, **changes})  # type: ignore[arg-type]
        targets = Targets(ttft_target, 0.0, class_targets)
        self.latency = LatencyController(0.1, targets, 256, 8)
        self.now = 100.0
        monkeypatch.setattr(admission_module.time, "monotonic", lambda: self.now)
        self.admission = Admission(self.scheduler, self.latency, targets)
        self.first: dict[int, float] = {}
        self.arrived: dict[int, float] = {}
        self.predicted: dict[int, float] = {}
        self._ids = iter(range(1, 10**9))

    def measure(self) -> None:
        for number in range(MEASURED):
            self.latency.computed(StepLoad(1 + number % 8, 0, 0.0), BASE + STREAM * (1 + number % 8))
            tokens, start = 50 + number, 37 * number % 800
            load = StepLoad(0, tokens, tokens * (start + tokens / 2))
            self.latency.computed(load, BASE + TOKEN * tokens + CONTEXT * load.context)
        for _ in range(admission_module.MIN_ENDED):
            self.submit(4, 20)
        self.run_until(lambda: not self.scheduler.has_work)

    def submit(
        self, prompt: int, output: int, timeout: float | None = None, first: int | None = None, **more: Any
    ) -> int:
        """Raises RequestRefusedError."""
        request_id = next(self._ids)
        sampling = SamplingParams(max_tokens=output, ignore_eos=True, timeout=timeout, **more)
        ids = [first or request_id % 90 + 1, *(1 + i % 50 for i in range(prompt - 1))]
        deadline = None if timeout is None else self.now + timeout
        request = Submit(request_id, ids, sampling, deadline)
        sequence = make_sequence(request)
        self.predicted[request_id] = self.admission.check(request, sequence)
        self.scheduler.add(sequence)
        self.admission.accepted(sequence, self.predicted[request_id])
        self.arrived[request_id] = self.now
        return request_id

    def step(self) -> None:
        plan = self.scheduler.schedule(self.latency.pace(self.scheduler.running))
        self.admission.planned()
        load = StepLoad.of(plan)
        seconds = BASE + STREAM * load.streams + TOKEN * load.tokens + CONTEXT * load.context
        self.now += seconds
        self.latency.computed(load, seconds)
        for output in self.scheduler.commit(plan, result(plan)):
            self.first.setdefault(output.request_id, self.now - self.arrived[output.request_id])
            self.admission.told(output, self.now)

    def run_until(self, done: Any) -> None:
        while not done():
            self.step()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize("seed", range(4))
def test_a_prediction_is_what_comes_true(machine: Machine, seed: int) -> None:
    machine.measure()
    draw = random.Random(seed)
    for _ in range(30):
        machine.submit(draw.randint(4, 600), 60, timeout=1e6)
    last = machine.submit(100, 10, timeout=1e6)
    machine.run_until(lambda: last in machine.first)
    assert machine.predicted[last] == pytest.approx(machine.first[last], rel=0.2)
    assert machine.predicted[last] > 0.5


@pytest.mark.parametrize("classes", ["0:tpot=0.03,100:tpot=1", "0:tpot=1,100:tpot=0.03"])
def test_a_prediction_counts_with_the_steps_of_the_strictest_class_that_runs(
    monkeypatch: pytest.MonkeyPatch, classes: str
) -> None:
    """Steps of 0.03 s have little time for prompts beside streams, those of the server's 0.1 s have more."""
    machine = Machine(monkeypatch, class_targets=classes)
    machine.measure()
    draw = random.Random(1)
    for number in range(30):
        machine.submit(draw.randint(200, 900), 25, timeout=1e6, priority=100 * (number % 2))
    last = machine.submit(100, 10, timeout=1e6, priority=100)
    machine.run_until(lambda: last in machine.first)
    assert machine.predicted[last] == pytest.approx(machine.first[last], rel=0.05)


def test_a_full_cache_is_waited_for_as_full_places_are(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, blocks=120, max_model_len=400)  # 480 tokens: two requests at a time
    machine.measure()
    for _ in range(10):
        machine.submit(200, 30, timeout=1e6)
    last = machine.submit(200, 30, timeout=1e6)
    machine.run_until(lambda: last in machine.first)
    assert machine.predicted[last] == pytest.approx(machine.first[last], rel=0.35)


def test_what_the_prefix_cache_has_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, prefix_caching=True)
    machine.measure()
    for first in range(91, 96):  # five beginnings, as of templates
        machine.submit(800, 4, first=first)
    machine.run_until(lambda: not machine.scheduler.has_work)
    for number in range(30):
        machine.submit(800, 30, timeout=1e6, first=91 + number % 5)
    last = machine.submit(800, 30, timeout=1e6, first=91)
    machine.run_until(lambda: last in machine.first)
    assert machine.predicted[last] == pytest.approx(machine.first[last], rel=0.25)


def test_who_can_not_make_its_deadline_is_told_at_once_when_it_could(machine: Machine) -> None:
    machine.measure()
    for _ in range(40):
        machine.submit(200, 50, timeout=1e6)
    with pytest.raises(RequestRefusedError, match=r"40 requests wait, .* its timeout leaves 0.2 s") as refused:
        machine.submit(200, 50, timeout=0.2)
    assert refused.value.reason == "overloaded"
    wait = ModelError(f"{refused.value} [overloaded]").expected_wait
    assert wait is not None
    assert 1 <= wait < 20
    started = machine.now
    machine.run_until(lambda: machine.now > started + wait)
    machine.submit(200, 50, timeout=1.2)
    assert machine.admission.refused_by_timeout == 1


def submit_until_refused(machine: Machine, **more: Any) -> NoReturn:
    while True:
        machine.submit(200, 50, **more)


def test_a_class_has_its_own_target(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, ttft_target=0.5, class_targets="0:ttft=3,100:ttft=0")
    machine.measure()
    with pytest.raises(RequestRefusedError, match=r"0\.8 of its ttft_target are 2\.4 s"):
        submit_until_refused(machine)
    with pytest.raises(RequestRefusedError, match=r"are 0\.4 s"):
        submit_until_refused(machine, priority=-1)
    machine.submit(200, 50, priority=100)
    with pytest.raises(RequestRefusedError, match=r"are 0\.8 s"):
        machine.submit(200, 50, priority=100, ttft_target=1.0)


def test_with_a_target_nobody_is_let_in_who_would_miss_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """More come than can be served: of those let in nearly all are in time, though the queue is as long as may be."""
    machine, draw = Machine(monkeypatch, ttft_target=2.0), random.Random(1)
    machine.measure()
    began, refused = machine.now, 0
    arrivals = iter(sorted(began + draw.uniform(0, 60) for _ in range(2 * 60 * 6)))
    coming = next(arrivals)
    accepted: list[int] = []
    while coming < began + 59:
        while coming <= machine.now:
            try:
                accepted.append(machine.submit(draw.randint(50, 250), draw.choice([20, 60])))
            except RequestRefusedError:
                refused += 1
            coming = next(arrivals)
        if machine.scheduler.has_work:
            machine.step()
        else:
            machine.now = coming
    machine.run_until(lambda: not machine.scheduler.has_work)
    met = [request_id for request_id in accepted if machine.first[request_id] <= 2.0]
    assert refused > 100
    assert len(met) > 0.95 * len(accepted)
    assert machine.admission.refused_by_target == refused
    assert max(machine.first.values()) > 1.0  # and no place was left that could have been used


def test_who_begins_at_once_is_never_refused_nor_is_anybody_by_what_is_not_measured(machine: Machine) -> None:
    for _ in range(30):
        machine.submit(100, 20, timeout=0.001)  # nothing is known of the machine yet
    machine.run_until(lambda: not machine.scheduler.has_work)
    machine.measure()
    for _ in range(7):
        machine.submit(100, 500)
    machine.run_until(lambda: not len(machine.scheduler.waiting))
    machine.submit(100, 500, timeout=0.001)  # in vain, but nobody can say so
    assert machine.admission.refused_by_timeout == 0
    machine.step()
    assert not len(machine.scheduler.waiting)
    with pytest.raises(RequestRefusedError, match="0 requests wait"):  # no place is left
        machine.submit(100, 20, timeout=0.1)


def test_what_an_earlier_engine_began_is_never_refused(machine: Machine) -> None:
    machine.measure()
    for _ in range(40):
        machine.submit(200, 50)
    sampling = SamplingParams(max_tokens=9, timeout=0.1)
    for changes in ({"output_token_ids": [5]}, {"accepted_before": True}):
        request = Submit(10**9, [1, 2], sampling, machine.now + 0.1, **changes)  # type: ignore[arg-type]
        assert machine.admission.check(request, make_sequence(request)) == 0
    fresh = Submit(10**9, [1, 2], sampling, machine.now + 0.1)
    with pytest.raises(RequestRefusedError):
        machine.admission.check(fresh, make_sequence(fresh))


def test_a_flood_of_one_tenant_and_less_urgent_requests_refuse_no_other(machine: Machine) -> None:
    machine.measure()
    for _ in range(60):
        machine.submit(200, 50, tenant="flood")
        machine.submit(200, 50, priority=5)
    with pytest.raises(RequestRefusedError):
        machine.submit(50, 20, timeout=3.0, tenant="flood")
    quiet = machine.submit(50, 20, timeout=3.0, tenant="quiet")
    machine.run_until(lambda: quiet in machine.first)
    assert machine.first[quiet] < 3.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("others", [{"tenant": "flood"}, {"priority": 5}, {"tenant": "flood", "priority": 5}])
def test_a_place_that_another_tenant_or_class_makes_is_not_waited_for(
    machine: Machine, others: dict[str, Any], seed: int
) -> None:
    """All places are taken, by long prompts and by long outputs."""
    machine.measure()
    draw = random.Random(seed)
    for _ in range(20):
        machine.submit(draw.randint(4, 1200), 600, **others)
    for _ in range(draw.randint(1, 200)):
        machine.step()
    quiet = machine.submit(50, 20, timeout=1.0, tenant="quiet", tenant_weight=4)
    machine.run_until(lambda: quiet in machine.first)
    assert machine.predicted[quiet] > 0
    assert machine.predicted[quiet] == pytest.approx(machine.first[quiet], rel=0.5, abs=0.1)


def test_a_tenant_with_all_places_makes_none_for_itself(machine: Machine) -> None:
    machine.measure()
    for _ in range(7):
        machine.submit(50, 1500, tenant="quiet")
    machine.submit(50, 1500, tenant="flood")
    machine.run_until(lambda: not machine.scheduler.waiting)
    with pytest.raises(RequestRefusedError):
        machine.submit(50, 20, timeout=1.0, tenant="quiet")


def test_what_the_prefix_cache_has_is_part_of_what_a_tenant_would_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it holds half of the blocks, and the others a quarter of the places each: they make no room."""
    machine = Machine(monkeypatch, blocks=400, prefix_caching=True)
    machine.measure()
    machine.submit(800, 4, first=91, tenant="quiet")
    machine.run_until(lambda: not machine.scheduler.has_work)
    for number in range(8):
        machine.submit(4, 80, tenant=f"{number % 4}")
    for _ in range(20):
        machine.step()
    quiet = machine.submit(800, 4, timeout=1e6, first=91, tenant="quiet")
    machine.run_until(lambda: quiet in machine.first)
    assert machine.scheduler.stats().preemptions == 0
    assert machine.predicted[quiet] == pytest.approx(machine.first[quiet], rel=0.2)


def test_predictions_are_corrected_by_what_came_of_them_within_bounds(machine: Machine) -> None:
    machine.measure()
    machine.latency.cost._streams.first *= 0.5  # it believes in a machine that is faster than the real one
    for _ in range(3):
        for _ in range(20):
            machine.submit(100, 60, timeout=1e6)
        machine.run_until(lambda: not machine.scheduler.has_work)
        machine.latency.cost._streams.first = BASE / 2
    assert 1.0 < machine.admission._correction <= 2.0


def test_predictions_take_no_more_than_their_share_of_the_time(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.measure()
    for _ in range(40):
        machine.submit(200, 50)
    calls = []
    monkeypatch.setattr(
        admission_module,
        "seconds_to_first_token",
        lambda *rest: (calls.append(1), setattr(machine, "now", machine.now + 0.01))[0] or 5.0,
    )
    for _ in range(10):
        with pytest.raises(RequestRefusedError):
            machine.submit(10, 10, timeout=1.0)
    machine.submit(10, 10, timeout=1.0, tenant="another")  # nothing is known of its wait: it is let in
    assert len(calls) == 1
    machine.now += 20 * 0.01
    with pytest.raises(RequestRefusedError):
        machine.submit(10, 10, timeout=1.0)
    assert len(calls) == 2


def test_of_many_that_come_at_once_no_more_are_let_in_than_if_each_were_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = []
    for seconds in (0.0, 0.01):  # that a prediction takes: with the latter only the first of them all is made
        with monkeypatch.context() as patch:
            machine = Machine(patch, ttft_target=3.0)
            machine.measure()

            def slow(*rest: Any, machine: Machine = machine, seconds: float = seconds) -> float:
                machine.now += seconds
                return seconds_to_first_token(*rest)

            patch.setattr(admission_module, "seconds_to_first_token", slow)
            for _ in range(60):
                with contextlib.suppress(RequestRefusedError):
                    machine.submit(100, 40)
            counts.append(len(machine.scheduler.waiting))
    assert 10 < counts[0] < 50
    assert counts[1] == pytest.approx(counts[0], rel=0.25)


def test_nothing_is_kept_of_requests_that_ended(machine: Machine) -> None:
    machine.measure()
    gone = machine.submit(20, 5)
    machine.scheduler.abort(gone)
    machine.admission.left(gone)
    machine.submit(20, 5)
    machine.run_until(lambda: not machine.scheduler.has_work)
    assert not machine.admission._accepted


def test_alone_it_takes_its_prompt_and_a_step() -> None:
    latency = LatencyController(0.0, Targets(), 2048, 8)
    for _ in range(20):
        latency.computed(StepLoad(1, 0, 0.0), 0.01)
        latency.computed(StepLoad(0, 100, 5000.0), 0.11)
    found = seconds_to_first_token(Backlog([], [], 99, 8), Work(300, 0, 5, 10, math.inf), latency)
    assert found == pytest.approx(0.31, rel=0.1)
