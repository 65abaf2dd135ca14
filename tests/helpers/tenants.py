"""A scheduler with tenants, and what each of them has got: counted from the plans, not by the scheduler."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import count

from helpers.scheduling import make, result
from tidewright.engine.pace import UNPACED, StepPace
from tidewright.engine.plan import StepPlan
from tidewright.engine.scheduler import Scheduler
from tidewright.engine.sequence import Sequence
from tidewright.schema import SamplingParams


@dataclass
class Tenants:
    """Prompts never have anything in common."""

    scheduler: Scheduler
    weights: dict[str, int] = field(default_factory=dict)
    cost: Counter[str] = field(default_factory=Counter)
    """Each token computed for the first time costs one, and so does each token drawn."""
    waiting: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._ids = count()
        self._tenant_of: dict[int, str] = {}
        self._computed: Counter[int] = Counter()
        self._drawn: set[tuple[int, int]] = set()

    def send(self, tenant: str, prompt: int, output: int, adapter: str = "", **params: object) -> int:
        request_id = next(self._ids)
        sampling = SamplingParams(
            tenant=tenant,
            tenant_weight=self.weights.get(tenant, 1),
            max_tokens=output,
            ignore_eos=True,
            **params,  # type: ignore[arg-type]
        )
        self.scheduler.add(Sequence(request_id, [request_id % 90] * prompt, sampling, adapter=adapter))
        self._tenant_of[request_id] = tenant
        self.waiting[tenant] += 1
        return request_id

    def step(self, pace: int | None = None) -> StepPlan:
        plan = self.scheduler.schedule(UNPACED if pace is None else StepPace(most=pace))
        self.note(plan)
        self.commit(plan)
        return plan

    def commit(self, plan: StepPlan) -> None:
        for output in self.scheduler.commit(plan, result(plan)):
            self.ended[self._tenant_of[output.request_id]] += output.finish_reason is not None

    def note(self, plan: StepPlan) -> None:
        for planned in plan.sequences:
            request_id, end = planned.request_id, planned.start + planned.count
            tenant, before = self._tenant_of[request_id], self._computed[request_id]
            self.waiting[tenant] -= before == 0
            self.cost[tenant] += max(end - before, 0)
            self._computed[request_id] = max(before, end)
            for draw in planned.draws:
                self.cost[tenant] += (request_id, draw.position) not in self._drawn
                self._drawn.add((request_id, draw.position))


def make_tenants(weights: dict[str, int] | None = None, blocks: int = 400, **changes: object) -> Tenants:
    values: dict[str, object] = {"max_running": 4, "max_batched_tokens": 32, "max_waiting": 10_000}
    return Tenants(make(blocks, **(values | changes))[0], weights or {})
