"""engine/scheduler.py over random workloads on tiny pools, with a fake model that reads its KV cache."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.scheduling import EOS, make
from tidewright.engine.plan import PENDING, DrawnToken, ScheduledSequence, SequenceResult, StepPlan, StepResult
from tidewright.engine.sequence import Sequence
from tidewright.schema import SamplingParams

ADAPTERS = ("x", "y", "z")


def next_token(history: tuple[int, ...]) -> int:
    """What the fake model generates: repeats itself now and then, so that guesses are sometimes right."""
    if len(history) % 13 == 0:
        return EOS
    return history[-3] if len(history) > 3 and len(history) % 5 else 1 + sum(history[-2:]) % 6


def reference(prompt: tuple[int, ...], max_tokens: int, ignore_eos: bool) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tuple(tokens)))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


class FakeModel:
    """A KV cache whose cells say of which salt and history they are; it reads nothing but them."""

    def __init__(self, block_size: int, salts: dict[int, str | None], num_blocks: int) -> None:
        self._block_size, self.num_blocks = block_size, num_blocks
        self._salts = salts
        self._cells: dict[tuple[int, int], tuple[str | None, tuple[int, ...]]] = {}
        self._tables: dict[int, list[int]] = {}
        self._drawn: dict[int, int] = {}  # the last token of each request

    def run(self, plan: StepPlan) -> StepResult:
        # All of a step is written before any of it is read, as in each layer of the real model; in any order.
        for planned in plan.sequences:
            table = self._tables.setdefault(planned.request_id, [])
            assert planned.first_block in (0, len(table))
            table[planned.first_block :] = planned.new_blocks
            assert max(table) < self.num_blocks
        for planned in reversed(plan.sequences):
            self._write(planned)
        results = tuple(self._read(planned) for planned in plan.sequences)
        self._drawn |= {
            planned.request_id: result.drawn[-1].token_id
            for planned, result in zip(plan.sequences, results, strict=True)
            if result.drawn
        }
        return StepResult(results)

    def resize(self, num_blocks: int, moves: dict[int, int]) -> None:
        """What blocks held that are gone is lost."""
        self.num_blocks = num_blocks
        cells = {
            (moves.get(block, block), offset): cell
            for (block, offset), cell in self._cells.items()
            if block not in moves.values()
        }
        self._cells = {at: cell for at, cell in cells.items() if at[0] < num_blocks}

    def fail(self, plan: StepPlan, how_far: int) -> None:
        """Runs out of memory: before it looked at the plan (0), before it wrote (1), or with rubbish written (2)."""
        for planned in plan.sequences if how_far else ():
            table = self._tables.setdefault(planned.request_id, [])
            table[planned.first_block :] = planned.new_blocks
            for position in range(planned.start, planned.start + planned.count) if how_far > 1 else ():
                self._cells[self._cell(planned, position)] = ("rubbish", (0,))

    def _cell(self, planned: ScheduledSequence, position: int) -> tuple[int, int]:
        return self._tables[planned.request_id][position // self._block_size], position % self._block_size

    def _write(self, planned: ScheduledSequence) -> None:
        for position, token in enumerate(planned.token_ids, start=planned.start):
            token = self._drawn[planned.request_id] if token == PENDING else token
            self._cells[self._cell(planned, position)] = (self._salts[planned.request_id], (token,))

    def _read(self, planned: ScheduledSequence) -> SequenceResult:
        cells = [self._cells[self._cell(planned, p)] for p in range(planned.start + planned.count)]
        assert {salt for salt, _ in cells} == {self._salts[planned.request_id]}
        history = tuple(token for _, (token,) in cells)
        ends = range(len(history) - len(planned.draws) + 1, len(history) + 1)
        return SequenceResult(tuple(DrawnToken(next_token(history[:end])) for end in ends))


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    priority: int
    ignore_eos: bool
    salt: str | None
    needs_history: bool
    tenant: str
    weight: int
    adapter: str

    def longest(self, work: Workload) -> int:
        return min(len(self.prompt) + self.max_tokens, int(str(work.config["max_model_len"])))


@dataclass(frozen=True)
class Workload:
    blocks: int
    config: dict[str, object]
    arrivals: list[Arrival]
    aborts: set[tuple[int, int]]  # step, request
    expiries: set[tuple[int, int]]
    ahead: bool  # steps overlap
    # By step: it runs out of memory. How far its launch gets, or 3: as its result is waited for.
    failures: dict[int, int]
    resizes: dict[int, int]  # by step: blocks beyond those that the longest request needs


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    block_size, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    room = block_size * blocks
    beginning = draw(st.lists(st.integers(1, 6), min_size=room, max_size=room))
    arrivals = []
    for _ in range(draw(st.integers(1, 12))):
        length, common = draw(st.integers(1, room)), draw(st.integers(0, room))
        own = draw(st.lists(st.integers(1, 6), min_size=length, max_size=length))
        arrivals.append(
            Arrival(
                step=draw(st.integers(0, 20)),
                prompt=tuple([*beginning[:common], *own][:length]),
                max_tokens=draw(st.integers(1, 12)),
                priority=draw(st.integers(0, 2)),
                ignore_eos=draw(st.booleans()),
                salt=draw(st.sampled_from([None, None, "a"])),
                needs_history=draw(st.integers(0, 7)) == 7,
                tenant=draw(st.sampled_from(["", "", "a", "b"])),
                weight=draw(st.integers(1, 3)),
                adapter=draw(st.sampled_from(["", "", *ADAPTERS])),
            )
        )
    events = st.sets(st.tuples(st.integers(0, 40), st.integers(0, len(arrivals) - 1)), max_size=4)
    config: dict[str, object] = {
        "block_size": block_size,
        "max_batched_tokens": draw(st.integers(1, 12)),
        "max_running": draw(st.integers(1, 6)),
        "max_model_len": room + 1,
        "prefix_caching": draw(st.booleans()),
        "speculative_tokens": draw(st.integers(-3, 3).map(lambda count: max(count, 0))),
        "adapter_slots": draw(st.integers(1, 2)),
    }
    failures = draw(st.dictionaries(st.integers(0, 30), st.integers(0, 3), max_size=4))
    resizes = draw(st.dictionaries(st.integers(0, 30), st.integers(0, 10), max_size=4))
    return Workload(blocks, config, arrivals, draw(events), draw(events), draw(st.booleans()), failures, resizes)


@settings(max_examples=300, deadline=None)
@given(workloads())
def test_random_workloads(work: Workload) -> None:
    (first, pool), (second, _) = (make(work.blocks, **work.config) for _ in range(2))
    block_size = int(str(work.config["block_size"]))
    least = -(-int(str(work.config["max_model_len"])) // block_size)
    model = FakeModel(block_size, {i: f"{a.salt} {a.adapter}" for i, a in enumerate(work.arrivals)}, work.blocks)
    slots: dict[int, str] = {}
    for name in ADAPTERS:
        for scheduler in (first, second):
            scheduler.adapters.add(name, f"digest of {name}")
    arrivals = work.arrivals
    produced: dict[int, list[int]] = {}
    ends: dict[int, list[str]] = {}
    aborted: set[int] = set()
    in_flight: deque[tuple[StepPlan, StepResult]] = deque()

    def commit(plan: StepPlan, step_result: StepResult) -> None:
        outputs = first.commit(plan, step_result)
        assert outputs == second.commit(plan, step_result)
        for output in outputs:
            produced[output.request_id] += output.token_ids
            if output.finish_reason:
                ends[output.request_id].append(output.finish_reason)

    def undo(plans: list[StepPlan]) -> None:
        for scheduler in (first, second):
            scheduler.undo(plans)
        assert pool.num_free == pool.num_blocks
        assert first.step_tokens == max(sum(planned.count for planned in plans[0].sequences) // 2, 1)
        in_flight.clear()

    now, last_arrival = 0, max(arrival.step for arrival in work.arrivals)
    total_tokens = sum(len(a.prompt) + a.max_tokens for a in work.arrivals)
    while now <= last_arrival or first.has_work or in_flight:
        for request_id, a in enumerate(work.arrivals):
            if a.step == now:
                params = SamplingParams(
                    max_tokens=a.max_tokens,
                    ignore_eos=a.ignore_eos,
                    priority=a.priority,
                    cache_salt=a.salt,
                    timeout=1,
                    presence_penalty=float(a.needs_history),
                    tenant=a.tenant,
                    tenant_weight=a.weight,
                )
                for scheduler in (first, second):
                    scheduler.add(Sequence(request_id, list(a.prompt), params, adapter=a.adapter))
                produced[request_id], ends[request_id] = [], []
        for request_id in sorted(request for at, request in work.aborts if at == now and request in produced):
            first.abort(request_id)
            second.abort(request_id)
            if not ends[request_id]:
                aborted.add(request_id)
        for request_id in sorted(request for at, request in work.expiries if at == now):
            output = first.expire(request_id)
            assert output == second.expire(request_id)
            if output:
                ends[request_id].append("timeout")

        if now in work.resizes:
            num_blocks = least + work.resizes[now]
            moves = first.resize(num_blocks)
            assert moves == second.resize(num_blocks)
            model.resize(num_blocks, moves)
            first.check_integrity()

        while not in_flight or (work.ahead and len(in_flight) == 1 and first.may_run_ahead):
            plan = first.schedule()
            assert plan == second.schedule()
            # Always progress, never an empty step, unless all that can be done is in flight.
            assert bool(plan.sequences) == first.has_work or (in_flight and not plan.sequences)
            if not plan.sequences:
                break
            count = sum(planned.count for planned in plan.sequences)
            assert count <= first.step_tokens <= work.config["max_batched_tokens"]  # type: ignore[operator]
            assert len(plan.sequences) <= work.config["max_running"]  # type: ignore[operator]
            slots |= dict(plan.adapters)
            for planned in plan.sequences:
                assert slots.get(planned.adapter, "") == arrivals[planned.request_id].adapter
                assert planned.request_id not in aborted
                assert not ends[planned.request_id]
                assert planned.count >= 1
                end, longest = planned.start + planned.count, arrivals[planned.request_id].longest(work)
                assert [draw.position for draw in planned.draws] == [*range(end + 1 - len(planned.draws), end + 1)]
                assert end < longest
                assert not (PENDING in planned.token_ids and arrivals[planned.request_id].needs_history)
            how_far = work.failures.get(now, 3)
            if how_far < 3:
                model.fail(plan, how_far)
                for earlier in in_flight:
                    commit(*earlier)
                undo([plan])
                break
            in_flight.append((plan, model.run(plan)))
        if in_flight and work.failures.get(now) == 3:
            for plan, _ in in_flight:
                model.fail(plan, 2)
            undo([plan for plan, _ in in_flight])
        elif in_flight:
            commit(*in_flight.popleft())
        first.check_integrity()
        now += 1
        # The first in order advances each step, so all is done within the work that computing everything anew would be.
        assert now <= last_arrival + 2 + total_tokens * (total_tokens + 2 + len(work.failures) + len(work.resizes))
    assert pool.num_free == pool.num_blocks
    for request_id, a in enumerate(work.arrivals):
        expected = reference(a.prompt, a.longest(work) - len(a.prompt), a.ignore_eos)
        if request_id in aborted:
            assert not ends[request_id]
        else:
            (reason,) = ends[request_id]
            if reason != "timeout":
                assert produced[request_id] == expected
                assert (reason == "stop") == (expected[-1] == EOS and not a.ignore_eos)
        assert produced[request_id] == expected[: len(produced[request_id])]
