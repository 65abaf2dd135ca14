"""A scheduler of tiny pools, whose every step can be compared as a whole."""

from __future__ import annotations

from tidewright.engine.limits import SchedulerConfig
from tidewright.engine.messages import SequenceOutput
from tidewright.engine.plan import DrawnToken, SequenceResult, StepPlan, StepResult
from tidewright.engine.scheduler import Scheduler
from tidewright.engine.sequence import Sequence
from tidewright.kv_cache.block_pool import BlockPool
from tidewright.schema import SamplingParams

VOCAB, EOS = 100, 99


def make(blocks: int = 8, **changes: object) -> tuple[Scheduler, BlockPool]:
    values: dict[str, object] = {
        "block_size": 4,
        "max_batched_tokens": 16,
        "max_running": 4,
        "max_waiting": 100,
        "max_model_len": 64,
        "prefix_caching": False,
    }
    pool = BlockPool(blocks)
    config = SchedulerConfig(**(values | changes), vocab_size=VOCAB, eos_ids=(EOS,))  # type: ignore[arg-type]
    return Scheduler(config, pool), pool


def sequence(request_id: int, prompt: int, **params: object) -> Sequence:
    return Sequence(request_id, [1 + i % 50 for i in range(prompt)], SamplingParams(**params))  # type: ignore[arg-type]


def result(plan: StepPlan, token: int = 7) -> StepResult:
    return StepResult(tuple(SequenceResult((DrawnToken(token),) * len(planned.draws)) for planned in plan.sequences))


def step(scheduler: Scheduler, token: int = 7) -> tuple[StepPlan, list[SequenceOutput]]:
    plan = scheduler.schedule()
    return plan, scheduler.commit(plan, result(plan, token))


def shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(s.request_id, s.start, s.count, bool(s.draws)) for s in plan.sequences]
