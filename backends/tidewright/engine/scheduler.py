"""Decides which tokens are computed in a step, and which blocks hold them. Pure: same inputs, same plans.

There is no prefill phase and no decode phase: a sequence's computed tokens chase its known tokens, under one
token budget a step. Every rank runs its own copy, so nothing here may depend on time, chance or hash order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tidewright.engine.messages import EngineStats, SequenceOutput
from tidewright.engine.plan import Draw, ScheduledSequence, StepPlan, StepResult
from tidewright.engine.sequence import Sequence
from tidewright.kv_cache.block_pool import BlockPool
from tidewright.schema import FinishReason


@dataclass(frozen=True)
class SchedulerConfig:
    block_size: int
    max_batched_tokens: int
    max_running: int
    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...] = ()


class RequestRefusedError(ValueError):
    """The request can never run; the message says what to change."""


class Scheduler:
    """First come, first served. `add` and `abort` take effect with the next `schedule`.

    Both queues are in order of arrival, and everything that runs came before everything that waits.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self._config = config
        self._pool = pool
        # Each running sequence gets at least one token a step.
        self._max_running = min(config.max_running, config.max_batched_tokens)
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._by_id: dict[int, Sequence] = {}
        self._steps = self._prompt_tokens = self._generated_tokens = self._preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Raises RequestRefusedError."""
        self._check(sequence)
        stop_ids = [*sequence.sampling.stop_token_ids]
        if not sequence.sampling.ignore_eos:
            stop_ids += self._config.eos_ids
        # A client may name ids that this vocabulary lacks: they never come, and can't be masked.
        sequence.stop_ids = frozenset(token for token in stop_ids if token < self._config.vocab_size)
        self._by_id[sequence.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: int) -> None:
        """Ends a request without output. Blocks of a step in flight return when it is committed."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return
        if sequence.in_flight:
            sequence.cancelled = True
        else:
            (self._running if sequence in self._running else self._waiting).remove(sequence)
            self._release(sequence)

    def schedule(self) -> StepPlan:
        budget = self._config.max_batched_tokens
        scheduled: list[ScheduledSequence] = []
        index = 0
        while index < len(self._running) and budget:
            sequence = self._running[index]
            # May preempt sequences behind this one. One that gets no block keeps its place for the next step.
            if self._grow(sequence):
                scheduled.append(self._take(sequence, budget))
                budget -= scheduled[-1].count
            index += 1
        while self._waiting and budget and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            needed = self._blocks(sequence.num_known)
            # One block is left for each running sequence: else who enters now is soon thrown out again.
            if needed + len(self._running) > self._pool.num_free:
                break
            sequence.block_table = self._pool.allocate(needed)
            self._running.append(self._waiting.popleft())
            scheduled.append(self._take(sequence, budget))
            budget -= scheduled[-1].count
        self._steps += 1
        return StepPlan(tuple(scheduled))

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceOutput]:
        """Enters a step's result; returns the new tokens of each request that has any."""
        outputs: list[SequenceOutput] = []
        members = {sequence.request_id: sequence for sequence in self._running if sequence.in_flight}
        ended: list[Sequence] = []
        for planned, computed in zip(plan.sequences, result.sequences, strict=True):
            sequence = members[planned.request_id]
            sequence.in_flight = False
            sequence.num_computed += planned.count
            if sequence.cancelled:
                ended.append(sequence)
            elif computed.drawn:
                token_id, logprobs = computed.drawn[0].token_id, computed.drawn[0].logprobs
                self._prompt_tokens += 0 if sequence.num_generated else len(sequence.prompt_token_ids)
                self._generated_tokens += 1
                sequence.token_ids.append(token_id)
                reason = self._finish_reason(sequence)
                entries = None if logprobs is None else [logprobs]
                outputs.append(SequenceOutput(sequence.request_id, [token_id], reason, entries))
                if reason:
                    ended.append(sequence)
                    del self._by_id[sequence.request_id]
        for sequence in ended:
            self._running.remove(sequence)
            self._release(sequence)
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            blocks_total=self._pool.num_blocks,
            blocks_free=self._pool.num_free,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._preemptions,
        )

    def _check(self, sequence: Sequence) -> None:
        config, prompt = self._config, sequence.prompt_token_ids
        if sequence.request_id in self._by_id:
            raise RequestRefusedError(f"request id {sequence.request_id} is already in use")
        if not prompt:
            raise RequestRefusedError("the prompt has no tokens")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise RequestRefusedError(f"the prompt has token ids outside of 0 … {config.vocab_size - 1}")
        if len(prompt) >= config.max_model_len:
            raise RequestRefusedError(
                f"the prompt has {len(prompt)} tokens, but prompt and output together are limited to "
                f"{config.max_model_len}"
            )
        # The last token is only sent, never computed.
        longest = min(len(prompt) + sequence.sampling.max_tokens, config.max_model_len) - 1
        if self._blocks(longest) > self._pool.num_blocks:
            raise RequestRefusedError(
                f"prompt and max_tokens may need {longest} tokens of KV cache, but it holds "
                f"{self._pool.num_blocks * config.block_size}; lower max_tokens or shorten the prompt"
            )

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_size)

    def _grow(self, sequence: Sequence) -> bool:
        """Gets blocks for all known tokens, from younger sequences if need be; False if even that fails.

        The oldest never fails, for `_check` made sure that it fits into the pool alone: so there is always progress.
        """
        needed = self._blocks(sequence.num_known) - len(sequence.block_table)
        while needed > self._pool.num_free and self._running[-1] is not sequence:
            self._preempt(self._running.pop())
        if needed > self._pool.num_free:
            return False
        sequence.block_table += self._pool.allocate(needed)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; its keys and values are computed anew later."""
        self._release(sequence)
        sequence.num_computed = 0
        self._waiting.appendleft(sequence)
        self._preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        # Last block first: the end of a sequence is the least likely to be of use to another.
        self._pool.free(reversed(sequence.block_table))
        sequence.block_table = []

    def _take(self, sequence: Sequence, budget: int) -> ScheduledSequence:
        sequence.in_flight = True
        start = sequence.num_computed
        end = min(sequence.num_known, start + budget)
        return ScheduledSequence(
            request_id=sequence.request_id,
            start=start,
            token_ids=tuple(sequence.token_ids[start:end]),
            block_table=tuple(sequence.block_table),
            draws=(self._draw(sequence),) if end == sequence.num_known else (),
        )

    def _draw(self, sequence: Sequence) -> Draw:
        may_stop = sequence.num_generated >= sequence.sampling.min_tokens
        banned = () if may_stop else tuple(sorted(sequence.stop_ids))
        return Draw(sequence.request_id, sequence.sampling, sequence.num_known, banned)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.token_ids[-1] in sequence.stop_ids:
            return "stop"
        if sequence.num_generated >= sequence.sampling.max_tokens:
            return "length"
        return "length" if sequence.num_known >= self._config.max_model_len else None
