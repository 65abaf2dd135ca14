"""What the scheduler and the model runner hand each other: the plan of one step, and its result. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from tidewright.engine.messages import TokenLogprob
from tidewright.schema import SamplingParams


@dataclass(frozen=True)
class Draw:
    """Choose the token at `position`; never one of `banned_ids`."""

    params: SamplingParams
    position: int
    banned_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ScheduledSequence:
    """Compute `token_ids`, which stand at positions start, start + 1, …; then `draw` the next, if asked for."""

    request_id: int
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    draw: Draw | None

    @property
    def count(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class StepPlan:
    sequences: tuple[ScheduledSequence, ...]


@dataclass(frozen=True)
class StepResult:
    """One entry for each sequence of the plan that has a draw, in the plan's order."""

    token_ids: tuple[int, ...]
    logprobs: tuple[list[TokenLogprob] | None, ...]
