"""engine/fairness.py in the scheduler: shares against an ideal fluid, idle time, starvation, preemption, and bounds."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tenants import Tenants, make_tenants
from tidewright.engine import fairness
from tidewright.engine.engine import make_sequence
from tidewright.engine.fairness import FairQueue
from tidewright.engine.limits import RequestRefusedError
from tidewright.engine.messages import Submit
from tidewright.engine.pace import StepPace
from tidewright.schema import SamplingParams

RUNNING = 4  # as of make_tenants
LONGEST_PROMPT, LONGEST_OUTPUT = 24, 8
MOST = RUNNING * (LONGEST_PROMPT + 2 * LONGEST_OUTPUT)  # what one tenant can have running, in cost


@st.composite
def tenants_and_sizes(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    weights = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    names = [f"tenant {i}" for i in range(len(weights))]
    sizes = st.tuples(st.integers(1, LONGEST_PROMPT), st.integers(1, LONGEST_OUTPUT))
    return dict(zip(names, weights, strict=True)), {name: draw(sizes) for name in names}


@settings(max_examples=40, deadline=None)
@given(tenants_and_sizes(), st.integers(0, 3), st.sampled_from([None, 8]))
def test_shares_follow_an_ideal_fluid(
    case: tuple[dict[str, int], dict[str, tuple[int, int]]], jitter: int, pace: int | None
) -> None:
    """Who always waits gets of each step its share by weight, as a fluid would; off by what can run at most."""
    weights, sizes = case
    tenants, rng = make_tenants(weights), random.Random(jitter)
    for _ in range(150):
        for name, (prompt, output) in sizes.items():
            while tenants.waiting[name] <= RUNNING:
                tenants.send(name, prompt, max(output - rng.randint(0, jitter), 1))
        tenants.step(pace)
        total = tenants.cost.total()
        for name, weight in weights.items():
            ideal = total * weight / sum(weights.values())
            assert abs(tenants.cost[name] - ideal) <= MOST * max(1, weight)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 3))
def test_idle_time_earns_nothing(idle: int, weight: int, other: int) -> None:
    tenants = make_tenants({"back": weight, "busy": other})
    tenants.send("back", 8, 4)
    for _ in range(idle):
        while tenants.waiting["busy"] <= RUNNING:
            tenants.send("busy", 8, 4)
        tenants.step()
    before = dict(tenants.cost)
    for _ in range(40):
        for name in ("back", "busy"):
            while tenants.waiting[name] <= RUNNING:
                tenants.send(name, 8, 4)
        tenants.step()
        got = {name: (tenants.cost[name] - before[name]) / weight for name, weight in tenants.weights.items()}
        assert abs(got["back"] - got["busy"]) <= 2 * MOST


def test_one_that_only_runs_saves_nothing_either() -> None:
    """A tenant with one long request uses less than its share, and can't have the rest at once later."""
    tenants = make_tenants(max_model_len=500)
    tenants.send("long", 1, 300)
    for _ in range(100):
        while tenants.waiting["busy"] <= RUNNING:
            tenants.send("busy", 8, 4)
        tenants.step()
    before = dict(tenants.cost)
    assert before["busy"] > 3 * before["long"]
    for _ in range(40):
        for name in ("long", "busy"):
            while tenants.waiting[name] <= RUNNING:
                tenants.send(name, 8, 4)
        tenants.step()
        got = {name: tenants.cost[name] - before[name] for name in before}
        assert got["busy"] >= got["long"] - 2 * MOST


def test_a_flood_in_front_delays_nobody() -> None:
    """The first of its tenant begins in the next step, whatever waits and runs: one that runs makes room."""
    tenants = make_tenants()
    for _ in range(200):
        tenants.send("flood", 8, 30)
    for _ in range(5):
        tenants.step()
    quiet = tenants.send("quiet", 8, 4)
    plan = tenants.step(pace=8)
    first = plan.sequences[0]
    assert (first.request_id, first.count) == (quiet, 8)
    assert plan.preempted == (RUNNING - 1,)
    assert len(plan.sequences) == RUNNING


def test_a_long_prompt_of_another_does_not_delay_a_short_one() -> None:
    tenants = make_tenants(max_model_len=1000, max_running=8)
    tenants.send("stream", 1, 50)
    tenants.step()
    long = tenants.send("long", 300, 1)
    assert {s.request_id: s.count for s in tenants.step(pace=16).sequences} == {0: 1, long: 16}
    short = tenants.send("short", 10, 2)
    plan = tenants.step(pace=16)
    assert {s.request_id: s.count for s in plan.sequences} == {0: 1, short: 10, long: 6}


def test_ever_new_tenants_starve_nobody() -> None:
    """With each step another one comes that has got nothing yet; a long prompt still gets its part of the steps."""
    tenants = make_tenants(max_model_len=1000, max_running=8)
    tenants.send("stream", 1, 900)
    tenants.step()
    tenants.send("long", 400, 1)
    steps = 0
    while not tenants.ended["long"]:
        tenants.send(f"new {steps}", 16, 1)
        tenants.step(16)
        steps += 1
        assert steps < 500


def test_prompts_of_tenants_take_turns_by_what_they_have_got() -> None:
    tenants = make_tenants({"double": 2}, max_running=8, max_batched_tokens=10)
    for _ in range(30):
        for name in ("double", "single"):
            tenants.send(name, 20, 1)
    for _ in range(60):
        tenants.step()
    assert abs(tenants.cost["double"] - 2 * tenants.cost["single"]) <= 3 * 21


def test_starvation_bound() -> None:
    """A request waits for what its tenant asked for before, by weight, and for what runs; never for more."""
    tenants = make_tenants({"quiet": 1, **{f"flood {i}": 3 for i in range(5)}}, max_running=RUNNING)
    for i in range(5):
        for _ in range(100):
            tenants.send(f"flood {i}", LONGEST_PROMPT, LONGEST_OUTPUT)
    for _ in range(20):
        tenants.step()
    before = dict(tenants.cost)
    for _ in range(5):
        tenants.send("quiet", 4, 2)
    own = 5 * (4 + 2 + 1)
    while tenants.ended["quiet"] < 5:
        tenants.step()
    for i in range(5):
        name = f"flood {i}"
        assert tenants.cost[name] - before[name] <= 3 * own + 2 * MOST


@pytest.mark.parametrize("weight", [1, 3])
def test_who_makes_room_is_of_a_tenant_that_holds_more(weight: int) -> None:
    """By weight: three places beside one are as they should be, or one too many; then the youngest yields, once."""
    tenants = make_tenants({"heavy": weight})
    for _ in range(3):
        tenants.send("heavy", 4, 40)
    tenants.send("light", 4, 40)
    tenants.step()
    for _ in range(3):
        tenants.send("light", 4, 40)
    preempted = [request_id for _ in range(30) for request_id in tenants.step().preempted]
    assert preempted == ([2] if weight == 1 else [])


def test_blocks_are_shared_as_well() -> None:
    """One whose prompts fill the cache makes room for another's, though there are places."""
    tenants = make_tenants(blocks=20, max_running=16, max_model_len=80, max_batched_tokens=100)
    for _ in range(4):
        tenants.send("large", 32, 20)
    for _ in range(3):
        tenants.step()
    small = tenants.send("small", 16, 2)
    plan = tenants.step()
    assert small in {s.request_id for s in plan.sequences}
    assert len(plan.preempted) == 1


def test_priority_comes_before_fairness() -> None:
    tenants = make_tenants()
    for _ in range(20):
        tenants.send("urgent", 8, 8, priority=-1)
    for _ in range(10):
        tenants.step()
    tenants.send("other", 8, 8)
    while tenants.ended["urgent"] < 17:
        tenants.step()
        assert not tenants.cost["other"]


def test_what_is_computed_again_costs_nothing() -> None:
    tenants = make_tenants(blocks=12, max_running=8, max_model_len=40)
    queue: FairQueue = tenants.scheduler.waiting
    for _ in range(6):
        tenants.send("one", 8, 16)
    undone = 0
    while tenants.scheduler.has_work:
        plan = tenants.scheduler.schedule()
        tenants.note(plan)
        (account,) = queue._classes[0].accounts.values()
        assert account.counter == tenants.cost["one"] * fairness.UNIT
        if undone < 3 and len(tenants.ended) + len(plan.sequences) > 2:
            tenants.scheduler.undo([plan])
            undone += 1
        else:
            tenants.commit(plan)
    assert tenants.scheduler.stats().preemptions > undone == 3


def test_thousands_of_tenants() -> None:
    """No place stays empty while somebody waits, all end, by their shares, and nothing is kept of those that left."""
    rng = random.Random(7)
    tenants = make_tenants(
        {f"{i}": 1 + i % 3 for i in range(2000)}, blocks=4000, max_running=64, max_batched_tokens=512
    )
    sent = 0
    queue: FairQueue = tenants.scheduler.waiting
    while sent < 5000 or tenants.waiting.total():
        for _ in range(min(rng.randint(0, 80), 5000 - sent)):
            tenants.send(f"{int(2000 * rng.random() ** 3)}", rng.randint(1, 12), rng.randint(1, 6))
            sent += 1
        plan = tenants.step()
        used = sum(s.count for s in plan.sequences)
        assert len(plan.sequences) == 64 or used == 512 or not tenants.waiting.total()
        waiting = sum(count > 0 for count in tenants.waiting.values())
        assert queue.num_accounts <= waiting + 64 + fairness.MOST_DEBTORS
        assert all(len(c._turns) <= 2 * len(c.accounts) + 17 for c in queue._classes.values())
    while tenants.scheduler.has_work:
        tenants.step()
    assert tenants.ended.total() == 5000
    assert queue.num_accounts == len(queue._requests) == len(queue) == 0


def test_idle_tenants_are_forgotten_even_if_they_are_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "MOST_DEBTORS", 10)
    tenants = make_tenants(max_running=2, max_model_len=1000)
    tenants.send("stays", 1, 900)
    queue: FairQueue = tenants.scheduler.waiting
    for number in range(200):
        tenants.send(f"{number}", 20, 1)
        tenants.step()
        assert queue.num_accounts <= 13


def test_one_tenant_leaves_places_in_the_queue() -> None:
    tenants = make_tenants(max_waiting=100)
    for _ in range(RUNNING + 75):
        tenants.send("flood", 4, 4)
    with pytest.raises(RequestRefusedError, match="79 requests of this tenant"):
        tenants.send("flood", 4, 4)
    sampling = SamplingParams(tenant="flood", max_tokens=4)
    tenants.scheduler.add(make_sequence(Submit(10**9, [1], sampling, accepted_before=True)))
    tenants.scheduler.abort(10**9)
    for _ in range(20):
        tenants.send("quiet", 4, 4)
    tenants = make_tenants(max_waiting=100)
    for _ in range(104):
        tenants.send("", 4, 4)
    with pytest.raises(RequestRefusedError, match="104 requests run or wait"):
        tenants.send("quiet", 4, 4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=20))
def test_one_tenant_alone_is_served_as_if_there_were_none(arrivals: list[tuple[int, int, int]]) -> None:
    def plans(tenant: str) -> list[tuple[tuple[int, int, int], ...]]:
        tenants: Tenants = make_tenants({tenant: 7}, blocks=16)
        found = []
        for now in range(400):
            for at, prompt, output in arrivals:
                if at == now:
                    tenants.send(tenant, prompt, output)
            plan = tenants.step()
            found.append(tuple((s.request_id, s.start, s.count) for s in plan.sequences))
        return found

    alone, none = plans("alone"), plans("")
    assert alone == none
    first_steps = [next(i for i, plan in enumerate(none) if any(s[0] == r for s in plan)) for r in range(len(arrivals))]
    assert all(one <= other for one, other in pairwise(first_steps))


def running_tenants() -> Tenants:
    """A stream, and a tenant whose claim is used up amid a long prompt."""
    tenants = make_tenants(max_model_len=1000, max_running=8)
    tenants.send("stream", 1, 500)
    tenants.step()
    tenants.send("long", 400, 1)
    for _ in range(5):
        tenants.step(pace=16)
    return tenants


def parts(tenants: Tenants, steps: int) -> list[dict[int, int]]:
    return [{s.request_id: s.count for s in tenants.step(pace=16).sequences} for _ in range(steps)]


def test_the_first_prompt_of_a_tenant_that_begins_shares_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others' prompts would have every second one, so that it took twice as long as alone."""
    monkeypatch.setattr(fairness, "CLAIM", 64 * fairness.UNIT)
    tenants = running_tenants()
    new = tenants.send("new", 40, 1)
    assert parts(tenants, 3) == [{0: 1, new: 16}, {0: 1, new: 16}, {0: 1, new: 8, 1: 8}]


def test_a_claim_ends_when_it_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "CLAIM", 64 * fairness.UNIT)
    tenants = running_tenants()
    new = tenants.send("new", 200, 1)
    alone = parts(tenants, 4)
    assert alone == [{0: 1, new: 16}] * 4
    # Then the other one catches up, and they take turns.
    assert parts(tenants, 2) == [{0: 1, 1: 16}] * 2


def test_who_is_ahead_has_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has had one, and got more than its share by it: next time it has to share."""
    monkeypatch.setattr(fairness, "CLAIM", 64 * fairness.UNIT)
    tenants = running_tenants()
    claims = []
    for _ in range(2):
        tenants.send("new", 60, 1)
        (waiting,) = tenants.scheduler.waiting.in_order()
        claims.append(waiting.account.claims)
        parts(tenants, 4)
    assert claims == [True, False]
    assert tenants.ended["new"] == 1


def test_what_was_preempted_gets_no_new_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "CLAIM", 64 * fairness.UNIT)
    tenants = running_tenants()
    plan = tenants.scheduler.schedule(StepPace(most=16))
    tenants.scheduler.undo([plan])
    (account,) = {s.account for s in tenants.scheduler.waiting.in_order() if s.request_id == 1}
    assert not account.claims


@settings(max_examples=30, deadline=None)
@given(tenants_and_sizes(), st.integers(1, 60), st.integers(0, 50))
def test_claims_do_not_change_shares(
    case: tuple[dict[str, int], dict[str, tuple[int, int]]], claim: int, seed: int
) -> None:
    """Some pause now and then, and begin with a claim each time; those that always wait keep their shares."""
    weights, sizes = case
    tenants, rng = make_tenants({**weights, "now and then": 1}), random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fairness, "CLAIM", claim * fairness.UNIT)
        for _ in range(120):
            for name, (prompt, output) in sizes.items():
                while tenants.waiting[name] <= RUNNING:
                    tenants.send(name, prompt, output)
            if rng.random() < 0.1:
                tenants.send("now and then", LONGEST_PROMPT, LONGEST_OUTPUT)
            tenants.step(8)
            total = sum(tenants.cost[name] for name in weights)
            for name, weight in weights.items():
                ideal = total * weight / sum(weights.values())
                assert abs(tenants.cost[name] - ideal) <= MOST * max(1, weight)
