"""Batches of sequences that are given by hand: where they begin, how many tokens they have, and their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tidewright.engine.plan import Draw, DrawnToken, ScheduledSequence, StepPlan
from tidewright.sampling.guided import GuidedDecoding
from tidewright.sampling.sampler import Choose
from tidewright.sampling.sampler import sample as sample_batch
from tidewright.schema import SamplingParams
from tidewright.step.batch import StepBatch
from tidewright.step.buffers import StepBuffers, StepLimits
from tidewright.step.sampling import Columns, SamplingBatch


@dataclass(frozen=True)
class Tokens:
    start: int
    count: int
    block_table: tuple[int, ...]


def batch_of(spans: Sequence[Tokens], block_size: int) -> StepBatch:
    longest = max(len(span.block_table) for span in spans)
    limits = StepLimits(len(spans), sum(span.count for span in spans), longest * block_size, block_size)
    plan = StepPlan(
        tuple(ScheduledSequence(i, span.start, (0,) * span.count, span.block_table) for i, span in enumerate(spans))
    )
    return StepBuffers(limits, torch.device("cpu")).fill(plan)


def in_order(spans: Sequence[Tokens], block_size: int) -> list[Tokens]:
    """As their tokens lie in a batch."""
    ends = batch_of(spans, block_size).end_rows
    return [spans[i] for i in sorted(range(len(spans)), key=ends.__getitem__)]


def sample(
    logits_BV: torch.Tensor,
    draws: Sequence[Draw],
    guided: GuidedDecoding | None = None,
    choose: Choose | None = None,
) -> list[DrawnToken]:
    return sample_batch(logits_BV, SamplingBatch.of(draws), guided, choose=choose).drawn.now()


def columns(params: Sequence[SamplingParams]) -> Columns[torch.Tensor]:
    return SamplingBatch.of([Draw(i, each, 1) for i, each in enumerate(params)]).device
