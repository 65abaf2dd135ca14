"""The controller against machines of synthetic speed: it finds what steps cost, and streams keep near their target."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.scheduling import make, result, sequence
from tidewright.engine.latency import FIRST, LEAST, SHARE, LatencyController
from tidewright.engine.pace import UNPACED
from tidewright.engine.step_cost import StepCost, StepLoad
from tidewright.engine.targets import Targets


@dataclass
class Machine:
    """What steps really take."""

    base: float
    stream: float
    token: float
    context: float
    noise: float = 0.0

    def __post_init__(self) -> None:
        self._random = random.Random(0)

    def seconds(self, load: StepLoad) -> float:
        exact = self.base + self.stream * load.streams + self.token * load.tokens + self.context * load.context
        return exact * (1 + self.noise * self._random.uniform(-1, 1))


# A CPU: a prompt's last tokens cost four times as much as its first. A GPU: a step of 8,000 tokens takes 0.2 s.
CPU = Machine(base=0.015, stream=0.001, token=0.001, context=4.5e-7)
GPU = Machine(base=0.008, stream=0.00002, token=0.00002, context=1e-9)


def run(
    machine: Machine, target: float, streams: int, prompt: int, *, holds: bool = True
) -> tuple[list[float], list[int]]:
    """Steps of `streams` that have run for a while, then with a prompt: their seconds, and its parts.

    `holds`: as a tpot_target, so that fewer may run.
    """
    scheduler, _ = make(blocks=2100, block_size=16, max_batched_tokens=2048, max_running=64, max_model_len=20_000)
    controller = LatencyController(*((0.25, Targets(tpot=target)) if holds else (target, Targets())), 2048, 64)
    for request_id in range(streams):
        scheduler.add(sequence(request_id, 8, max_tokens=10_000, ignore_eos=True))
    times, parts = [], []
    for number in range(20 + prompt):
        if number == 20:
            scheduler.add(sequence(streams, prompt, max_tokens=1))
        plan = scheduler.schedule(controller.pace(scheduler.running))
        load = StepLoad.of(plan)
        seconds = machine.seconds(load)
        controller.computed(load, seconds)
        outputs = scheduler.commit(plan, result(plan))
        if number >= 20:
            times.append(seconds)
            parts.append(load.tokens)
        if any(output.finish_reason for output in outputs):
            return times, parts
    raise AssertionError("the prompt never came to its end")


@pytest.mark.parametrize(("machine", "target"), [(CPU, 0.1), (CPU, 0.25), (GPU, 0.02)])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_no_gap_beside_a_long_prompt_is_over_twice_the_target(machine: Machine, target: float, noise: float) -> None:
    noisy = Machine(machine.base, machine.stream, machine.token, machine.context, noise)
    times, parts = run(noisy, target, streams=4, prompt=8000)
    assert max(times) < (1 + noise) * 1.25 * target < 2 * target
    # It takes what there is: nearly all of the target, once that is known.
    settled = times[len(times) // 4 : -1]
    assert sum(settled) / len(settled) > 0.8 * target
    if machine is CPU:
        assert parts[-2] < parts[len(parts) // 4]  # the context costs


def test_without_knowing_what_context_costs_the_last_parts_would_take_too_long() -> None:
    """The reference: parts of one size, as many tokens as fit at the start."""
    times, parts = run(CPU, 0.1, streams=4, prompt=8000)
    largest = max(parts)
    load = StepLoad(4, largest, largest * 7000)
    assert CPU.seconds(load) > 2 * 0.1 > max(times)


@pytest.mark.parametrize("streams", [1, 16, 40])
def test_prompts_get_their_share_when_streams_take_all_of_the_target(streams: int) -> None:
    slow = Machine(base=0.05, stream=0.02, token=0.0005, context=0.0)
    times, parts = run(slow, 0.05, streams, prompt=3000, holds=False)
    decode = slow.base + slow.stream * streams
    assert sum(parts[:-1]) * slow.token > 0.8 * SHARE * decode * len(parts[:-1])
    assert max(times) < 1.3 * decode


def test_a_machine_too_slow_for_any_part_still_computes_some_tokens() -> None:
    _, parts = run(Machine(base=0.01, stream=0.0, token=1.0, context=0.0), 0.05, 2, prompt=300)
    assert set(parts[1:-1]) == {LEAST}


def test_parts_begin_small_and_at_most_double() -> None:
    _, parts = run(GPU, 10.0, 2, prompt=4000)
    assert parts == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST, 16 * FIRST, 4000 - 31 * FIRST]


@settings(max_examples=25, deadline=None)
@given(
    base=st.floats(1e-3, 0.1),
    stream=st.floats(1e-5, 0.01),
    token=st.floats(1e-5, 0.01),
    context=st.floats(0, 1e-6),
    seed=st.integers(0, 99),
)
def test_costs_are_found(base: float, stream: float, token: float, context: float, seed: int) -> None:
    machine, draw, cost = Machine(base, stream, token, context), random.Random(seed), StepCost(64)
    for _ in range(60):
        load = StepLoad(draw.randint(1, 64), 0, 0.0)
        cost.computed(load, machine.seconds(load))
    for _ in range(60):
        tokens, start = draw.randint(50, 500), draw.randint(0, 8000)
        load = StepLoad(draw.randint(0, 64), tokens, tokens * (start + tokens / 2))
        cost.computed(load, machine.seconds(load))
    for streams in (1, 64):
        assert cost.decode(streams) == pytest.approx(machine.seconds(StepLoad(streams, 0, 0.0)), rel=0.05)
    for start in (0, 8000):
        exact = 300 * (token + context * (start + 150))
        assert cost.prompt(start, 300) == pytest.approx(exact, rel=0.1, abs=0.05 * (base + 64 * stream))


def test_a_step_that_took_no_time_makes_the_next_ones_no_longer() -> None:
    """Its error, relative to the little that was measured, outweighed all others: steps took four times as long."""
    cost = StepCost(64)
    for _ in range(20):
        cost.computed(StepLoad(4, 0, 0.0), 0.02)
    for number in range(30):
        load = StepLoad(4, 100, 100 * (1000.0 + 100 * number))
        cost.computed(load, 0.02 + 100 * 0.002 * (0.1 if number == 26 else 1.0))
    assert cost.prompt(4000, 100) == pytest.approx(0.2, rel=0.15)
    cost.computed(StepLoad(4, 0, 0.0), 0.002)
    assert cost.decode(4) == pytest.approx(0.02, rel=0.15)


def test_a_few_steps_that_were_held_up_change_little_and_a_lasting_change_is_followed() -> None:
    cost = StepCost(64)
    for number in range(40):
        cost.computed(StepLoad(4, 0, 0.0), 2.0 if number in (30, 36) else 0.02)
    assert cost.decode(4) == pytest.approx(0.02, rel=0.05)
    for _ in range(50):
        cost.computed(StepLoad(4, 0, 0.0), 0.06)
    assert cost.decode(4) == pytest.approx(0.06, rel=0.1)


def test_of_one_number_of_streams_base_is_told_and_not_what_each_costs() -> None:
    cost = StepCost(64)
    cost.computed(StepLoad(2, 0, 0.0), 0.02)
    assert cost.decode(2) <= cost.decode(64) < 0.04  # 0.6 if each stream cost half of it


def settle(controller: LatencyController, machine: Machine, waiting: int, steps: int, running: int = 0) -> list[int]:
    """How many run, step by step, while enough wait; none ends but when fewer may run."""
    history = []
    for _ in range(steps):
        running = min(max(running, min(controller.running, waiting)), waiting)
        running -= running > controller.running  # one of those above the limit ends
        load = StepLoad(running, 0, 0.0)
        controller.computed(load, machine.seconds(load))
        history.append(running)
    return history


@settings(max_examples=60, deadline=None)
@given(base=st.floats(0.001, 0.2), stream=st.floats(1e-5, 0.02), noise=st.floats(0, 0.1), target=st.floats(0.02, 0.2))
def test_as_many_run_as_the_target_allows_and_never_none(
    base: float, stream: float, noise: float, target: float
) -> None:
    machine, controller = (
        Machine(base, stream, 0.0, 0.0, noise),
        LatencyController(0.25, Targets(tpot=target), 2048, 64),
    )
    settle(controller, machine, 64, 1500)
    history = settle(controller, machine, 64, 300, running=controller.running)
    assert min(history) >= 1
    fitting = min((0.75 * target - base) / stream, 64)
    assert max(history) <= max(1.15 * fitting / (1 - noise) + 1, 2)
    assert min(history) >= min(max(0.6 * (0.6 * target / (1 + noise) - base) / stream - 1, 1), 64)


def test_without_noise_the_number_comes_to_rest() -> None:
    controller = LatencyController(0.25, Targets(tpot=0.1), 2048, 64)
    machine = Machine(0.01, 0.002, 0.0, 0.0)
    settle(controller, machine, 64, 1000)
    assert len(set(settle(controller, machine, 64, 200, running=controller.running))) == 1


def test_the_number_waits_until_those_above_it_have_ended() -> None:
    controller = LatencyController(0.25, Targets(tpot=0.1), 2048, 64)
    for _ in range(400):
        controller.computed(StepLoad(64, 0, 0.0), 0.2)
    assert controller.running == 48


def test_a_stream_with_guesses_is_one_stream() -> None:
    """Tokens were counted, of which there were always more than may run: so the number never went down."""
    scheduler, _ = make(blocks=400, max_batched_tokens=256, max_running=8, max_model_len=200, speculative_tokens=4)
    controller = LatencyController(0.25, Targets(tpot=0.1), 256, 8)
    for request_id in range(8):
        scheduler.add(sequence(request_id, 60, max_tokens=130, ignore_eos=True))
    for _ in range(24):
        plan = scheduler.schedule(controller.pace(scheduler.running))
        load = StepLoad.of(plan)
        controller.computed(load, 1.0)
        scheduler.commit(plan, result(plan))
    assert sum(planned.count for planned in plan.sequences) > len(plan.sequences) == load.streams
    assert controller.running < 8


def test_without_a_target_any_number_runs_and_steps_take_step_time() -> None:
    controller = LatencyController(0.25, Targets(), 2048, 64)
    for _ in range(400):
        controller.computed(StepLoad(64, 0, 0.0), 2.0)
    assert controller.running == 64
    assert LatencyController(0.25, Targets(tpot=0.1), 2048, 64).pace([]).seconds == 0.1
    assert LatencyController(0.25, Targets(), 2048, 64).pace([]).seconds == 0.25
    assert LatencyController(0.0, Targets(), 2048, 64).pace([]) == UNPACED


def test_a_caller_may_loosen_the_pace_of_its_own_stream_and_never_tighten_that_of_others() -> None:
    controller = LatencyController(0.25, Targets(tpot=0.1), 2048, 64)
    loose, strict, plain = (sequence(n, 3, **more) for n, more in enumerate(OWN))
    for one in (loose, strict, plain):
        controller.submitted(one.sampling)
    for running, expected in [
        ([loose], 0.5),
        ([loose, plain], 0.1),
        ([strict], 0.1),
        ([strict, loose], 0.1),
        ([], 0.1),
    ]:
        assert controller.pace(running).seconds == pytest.approx(expected)


OWN: list[dict[str, float]] = [{"tpot_target": 0.5}, {"tpot_target": 0.001}, {}]
