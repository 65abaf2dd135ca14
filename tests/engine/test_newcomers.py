"""engine/newcomers.py: steps are short while another tenant may come, so a first token takes twice as long at most
as alone."""

from __future__ import annotations

import pytest

from benchmarks.tenancy_simulated import Simulation, first_tokens
from benchmarks.tenant_load import Tenant
from helpers.scheduling import sequence
from tidewright.engine import fairness
from tidewright.engine.fairness import FairQueue
from tidewright.engine.newcomers import IN_FLIGHT, MOST, WINDOW, WORTH, Newcomers
from tidewright.engine.pace import UNPACED, StepPace
from tidewright.engine.step_cost import StepCost, StepLoad

BASE, STREAM, TOKEN = 0.01, 0.001, 0.0005
PACE = StepPace(seconds=0.2, token=TOKEN)


def measured() -> StepCost:
    cost = StepCost(16)
    for number in range(60):
        cost.computed(StepLoad(1 + number % 16, 0, 0.0), BASE + STREAM * (1 + number % 16))
        cost.computed(StepLoad(0, 100 + number, 0.0), BASE + TOKEN * (100 + number))
    return cost


def come(newcomers: Newcomers, tenant: str, prompt: int, now: float = 0.0) -> None:
    newcomers.submitted(sequence(1, prompt, tenant=tenant), now)


def others(newcomers: Newcomers, now: float = 0.0, running: int = 4, waiting: FairQueue | None = None) -> float:
    return newcomers.shorten(PACE, running, waiting or FairQueue(), now).others


def test_one_tenant_alone_costs_nothing() -> None:
    newcomers = Newcomers(measured())
    assert newcomers.shorten(PACE, 4, FairQueue(), 0.0) is PACE
    for _ in range(3):
        come(newcomers, "one", 10)
    assert newcomers.shorten(PACE, 4, FairQueue(), 0.0) is PACE


def test_the_step_in_flight_takes_less_than_the_shortest_prompt_does_alone() -> None:
    newcomers = Newcomers(measured())
    come(newcomers, "long", 2000)
    come(newcomers, "short", 200)
    alone = BASE + STREAM + 200 * TOKEN
    assert others(newcomers) == pytest.approx(IN_FLIGHT * alone - BASE - 4 * STREAM, rel=0.02)
    come(newcomers, "shorter", 20)
    assert others(newcomers) == pytest.approx(WORTH * (BASE + 4 * STREAM), rel=0.02)  # but prompts must be worth a step
    assert others(newcomers, running=16) == pytest.approx(WORTH * (BASE + 16 * STREAM), rel=0.02)


def test_one_that_has_to_wait_is_not_expected_and_neither_is_who_left_long_ago() -> None:
    newcomers, waiting = Newcomers(measured()), FairQueue()
    come(newcomers, "long", 2000)
    come(newcomers, "short", 20, now=5.0)
    assert others(newcomers, now=5.0) < PACE.seconds
    queued = sequence(7, 20, tenant="short")
    waiting.add(queued)
    assert others(newcomers, 5.0, waiting=waiting) < PACE.seconds  # it has just come, and has a claim
    queued.account.claims_until = 0
    queued.account.stand(1)
    assert others(newcomers, 5.0, waiting=waiting) == PACE.seconds
    waiting.begin(queued)
    assert others(newcomers, 5.0, waiting=waiting) < PACE.seconds
    come(newcomers, "long", 2000, now=WINDOW)
    assert others(newcomers, now=WINDOW + 4.9) < PACE.seconds
    assert newcomers.shorten(PACE, 4, waiting, WINDOW + 5.1) is PACE


def test_nothing_is_bounded_before_costs_are_known_or_where_steps_may_take_any_time() -> None:
    unknown, known = Newcomers(StepCost(16)), Newcomers(measured())
    for newcomers in (unknown, known):
        come(newcomers, "one", 10)
        come(newcomers, "two", 10)
    assert unknown.shorten(PACE, 4, FairQueue(), 0.0) is PACE
    assert known.shorten(UNPACED, 4, FairQueue(), 0.0) is UNPACED


def test_the_latest_tenants_are_remembered_and_their_usual_prompts() -> None:
    newcomers = Newcomers(measured())
    come(newcomers, "short", 20)
    for number in range(MOST):
        come(newcomers, f"{number}", 2000)
    assert len(newcomers._seen) == MOST
    assert others(newcomers) == PACE.seconds  # the short one is forgotten
    come(newcomers, "3", 400)
    assert newcomers._seen["3"].tokens == 1600


@pytest.mark.parametrize("prompt", [64, 512])
def test_a_first_token_beside_a_flood_takes_twice_as_long_as_alone_at_most(
    prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of its own. The flood gets less by it, but not by a quarter; short steps without claims don't do."""
    slowest, served = {}, {}
    for means in ("both", "neither"):
        if means == "neither":
            monkeypatch.setattr(fairness, "CLAIM", 0)
        simulation = Simulation(running=16, expects=means == "both")
        quiet, flood = Tenant("quiet", 1, prompt, output=4, least=0), Tenant("flood", 1, 1000, output=64, least=32)
        first_tokens(simulation, quiet, flood, requests=14)
        alone, *beside = quiet.firsts
        slowest[means], served[means] = max(beside[2:]) / alone, flood.cost / simulation.now
    assert slowest["both"] <= 2 < slowest["neither"]
    assert served["both"] > 0.75 * served["neither"]
