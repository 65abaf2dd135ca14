"""What the scheduler and the model runner hand each other: the plan of one step, and its result. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from tidewright.engine.messages import TokenLogprob
from tidewright.schema import SamplingParams


@dataclass(frozen=True)
class History:
    """The tokens before a draw: the first `length` of `token_ids`, then `drafts`, which are guesses.

    `token_ids` is the sequence's own list, so that a plan copies nothing of it. It only grows: what is counted or
    matched of it once needs no second look, as long as it is the same list.
    """

    token_ids: Sequence[int] = field(repr=False)
    length: int
    prompt_length: int = 0  # how many of them are the prompt's; the others are output
    drafts: tuple[int, ...] = field(default=(), repr=False)

    def output(self, first: int = 0) -> list[int]:
        """From number `first` of the output on, drafts included."""
        known = self.token_ids[self.prompt_length + first : self.length]
        return [*known, *self.drafts[max(self.prompt_length + first - self.length, 0) :]]

    def tail(self, count: int) -> tuple[int, ...]:
        """The last `count` tokens, drafts included; fewer if there are no more."""
        first = self.length + len(self.drafts) - count
        return (*self.token_ids[max(first, 0) : self.length], *self.drafts[max(first - self.length, 0) :])


NO_HISTORY = History((), 0)
PENDING = -1
"""A token id: the token that a step in flight draws for the sequence."""


class Draw(msgspec.Struct, frozen=True, gc=False):
    """Choose the token at `position`; never one of `banned_ids`.

    `history` is filled only if `params.needs_history`.
    """

    request_id: int
    params: SamplingParams
    position: int
    banned_ids: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    history: History = NO_HISTORY


class ScheduledSequence(msgspec.Struct, frozen=True, gc=False):
    """Compute `token_ids`, which stand at positions start, start + 1, …, and draw after the last of them.

    The last may be PENDING: the step before draws it, and the device has it then. There are several draws when the last
    tokens are speculative: one after each of the last len(draws) tokens.
    `new_blocks` continue the block table that the plans before this one gave; it begins anew with `first_block` 0,
    when the sequence was admitted since, or some of its blocks were moved.
    Block number i of a table holds positions i * S … i * S + S - 1.
    """

    request_id: int
    start: int
    token_ids: tuple[int, ...]
    new_blocks: tuple[int, ...]
    draws: tuple[Draw, ...] = ()
    # Report log-probabilities of the prompt tokens that follow these ones: how many of the most likely, and which.
    prompt_logprobs: int | None = None
    next_prompt_ids: tuple[int, ...] = ()
    embeds: bool = False  # these tokens complete the prompt: its embedding is due
    first_block: int = 0  # the number of the first of `new_blocks` in the block table
    adapter: int = -1  # the slot of its LoRA adapter; -1: none

    @property
    def count(self) -> int:
        return len(self.token_ids)

    @property
    def drafts(self) -> tuple[int, ...]:
        """The speculative ones of `token_ids`."""
        return self.token_ids[1 - len(self.draws) :] if len(self.draws) > 1 else ()


class StepPlan(msgspec.Struct, frozen=True, gc=False):
    sequences: tuple[ScheduledSequence, ...]
    ended: tuple[int, ...] = ()  # requests that ended since the last plan: state kept for them can go
    preempted: tuple[int, ...] = ()  # for the sake of this one
    adapters: tuple[tuple[int, str], ...] = ()  # slots that get another LoRA adapter before this step

    @property
    def summary(self) -> str:
        """For logs: without tokens, which are their callers'."""
        sequences = (
            f"request {one.request_id}: {one.count} tokens from {one.start}, {len(one.draws)} draws, "
            f"blocks {list(one.new_blocks)} from number {one.first_block}"
            for one in self.sequences
        )
        return f"{'; '.join(sequences)}; ended {list(self.ended)}"


class DrawnToken(msgspec.Struct, frozen=True, gc=False):
    token_id: int
    logprobs: list[TokenLogprob] | None = None  # the chosen token's, then those of the most likely ones
    error: str = ""  # the request can't go on, and why; the token means nothing then


class SequenceResult(msgspec.Struct, frozen=True, gc=False):
    """One entry for each draw of a scheduled sequence, and for each of its `next_prompt_ids`."""

    drawn: tuple[DrawnToken, ...] = ()
    prompt_logprobs: tuple[list[TokenLogprob], ...] = ()
    embedding: bytes | None = None  # if it was due


class StepResult(msgspec.Struct, frozen=True, gc=False):
    """One entry for each sequence of the plan, in the plan's order."""

    sequences: tuple[SequenceResult, ...]

    @classmethod
    def of(
        cls,
        plan: StepPlan,
        drawn: Iterable[DrawnToken],
        prompt_logprobs: Mapping[int, tuple[list[TokenLogprob], ...]],
        embeddings: Mapping[int, bytes] | None = None,
    ) -> StepResult:
        """`drawn` for all draws of the plan in order, or none; the reports and embeddings by request."""
        embeddings = embeddings or {}
        rest = iter(drawn)
        return cls(
            tuple(
                SequenceResult(
                    tuple(islice(rest, len(planned.draws))),
                    prompt_logprobs.get(planned.request_id, ()),
                    embeddings.get(planned.request_id),
                )
                for planned in plan.sequences
            )
        )
