"""Decides which tokens are computed in a step. Pure: same inputs, same plans.

There is no prefill phase and no decode phase: a sequence's computed tokens chase its known tokens, under one
token budget a step. Every rank runs its own copy, so nothing here may depend on time, chance or hash order.

step_tokens.py says which tokens of one sequence these are, and running.py has the blocks that hold them, and preempts
sequences to get them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Collection
from itertools import islice

from tidewright.engine.adapter_turns import sharers
from tidewright.engine.draws import accept, embedded
from tidewright.engine.fairness import Account, FairQueue, fair_order, goes_before
from tidewright.engine.limits import RequestRefusedError, SchedulerConfig, check_request, check_share, longest, stop_ids
from tidewright.engine.messages import EngineStats, SequenceOutput
from tidewright.engine.pace import UNPACED, Allowance, StepPace
from tidewright.engine.plan import ScheduledSequence, SequenceResult, StepPlan, StepResult
from tidewright.engine.running import RunningSequences
from tidewright.engine.sequence import Sequence
from tidewright.engine.step_budget import StepBudget
from tidewright.engine.step_tokens import StepTokens
from tidewright.errors import seconds_text
from tidewright.kv_cache.block_pool import BlockPool, BlockPoolError
from tidewright.kv_cache.budget import blocks_of
from tidewright.kv_cache.prefix_cache import PrefixCache
from tidewright.lora.slots import AdapterSlots
from tidewright.schema import NO_ADAPTER


class Scheduler:
    """By priority, then fair between tenants (fairness.py), then first come, first served.

    A step may be planned while the one before is in flight, that is, planned and not committed, if `may_run_ahead`:
    each sequence of that one is taken to get its token and to go on. One that ends with it has been computed for
    nothing, and what the second step finds for it is dropped. Requests may come and end at any time between.

    Of one tenant and priority, everything that runs came before everything that waits.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config = config
        self.cache = PrefixCache(pool, config.block_size, config.prefix_caching)
        self.adapters = AdapterSlots(config.adapter_slots)
        self.waiting = FairQueue()
        self._running = RunningSequences(config, self.cache, self.adapters, self.waiting)
        self._tokens = StepTokens(config, self._running)
        self._budget = StepBudget(config.max_batched_tokens)
        self._by_id: dict[int, Sequence] = {}
        self._in_flight: deque[list[Sequence]] = deque()  # of each plan
        self._ended: list[int] = []  # since the last plan
        self._arrivals = self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._prefix_queries = self._prefix_hits = self._drafted = self._accepted = self._undone = 0

    @property
    def step_tokens(self) -> int:
        """That a step may compute, at most."""
        return self._budget.tokens

    @property
    def running(self) -> Collection[Sequence]:
        return self._running.line

    @property
    def free_blocks(self) -> int:
        """That no sequence has and none will soon be preempted for."""
        return max(self._running.spare_blocks, 0)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def may_run_ahead(self) -> bool:
        """The next step can be planned before the one in flight is committed: no choice depends on what it draws."""
        return not self.config.speculative_tokens and not any(
            sequence.num_pending and sequence.needs_history for sequence in self.running
        )

    def add(self, sequence: Sequence) -> None:
        """Raises RequestRefusedError."""
        if sequence.request_id in self._by_id:
            raise RequestRefusedError(f"request id {sequence.request_id} is already in use")
        if len(self._by_id) >= self.config.max_running + self.config.max_waiting:
            raise RequestRefusedError(f"{len(self._by_id)} requests run or wait already; try again later", "overloaded")
        if not sequence.accepted_before:
            self.check_share(sequence.sampling.tenant)
        check_request(sequence, self.config, self.cache.pool.num_blocks)
        if sequence.adapter:
            if self.adapters.digest(sequence.adapter) is None:
                raise RequestRefusedError(f"{NO_ADAPTER}{sequence.adapter!r} is loaded")
            self.adapters.join(sequence.adapter)
        sequence.stop_ids = stop_ids(sequence.sampling, self.config)
        sequence.longest = longest(sequence, self.config)
        sequence.order = (sequence.sampling.priority, self._arrivals)
        self._arrivals += 1
        self._by_id[sequence.request_id] = sequence
        self.waiting.add(sequence)

    def check_share(self, tenant: str, held: int = 0, own: int = 0) -> None:
        """As limits.py's. `held`: requests that wait for something else before they come here, `own` the tenant's."""
        check_share(tenant, self.config, len(self._by_id) + held, self.waiting.requests(tenant) + own)

    def abort(self, request_id: int) -> None:
        """Ends a request without output; unknown ids are ignored."""
        if sequence := self._by_id.get(request_id):
            self._end(sequence)

    def expire(self, request_id: int) -> SequenceOutput | None:
        """Ends a request whose deadline has passed; its last output, or None if it ended before."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return None
        where = "while it ran" if sequence in self.running else "while it was queued"
        self._end(sequence)
        message = f"timed out after {seconds_text(sequence.sampling.timeout)} s {where}"
        return SequenceOutput(request_id, [], "timeout", message=message)

    def schedule(self, pace: StepPace = UNPACED) -> StepPlan:
        """`pace`: what a step may cost while sequences wait for their next token.

        A plan without sequences has changed nothing and need not be run; while nothing is in flight, there is one only
        if there is no work.
        """
        assert len(self._in_flight) <= 1, "a step can only run ahead of one other"
        before = self._running.line
        if self.waiting.is_shared:
            self._running.line = sorted(before, key=fair_order)
        line, tokens, guessing = self._running.line, self._tokens, self.config.speculative_tokens
        budget, index, waiting = self._budget.tokens, 0, self._next_waiting(0)
        turn = self._turn(waiting, 0)
        allowance = Allowance(pace, any(s.decodes for s in line))
        preemptions = self._running.preemptions
        scheduled: list[ScheduledSequence] = []
        sequences: list[Sequence] = []  # of these
        self.cache.begin_step()
        while budget:
            if waiting and index == turn:
                # A request that does not fit blocks those behind it, or it might wait forever. And one that was just
                # preempted is not admitted again in the same step.
                if not self._admit(waiting, index, pace.running, allowance):
                    waiting, turn = None, len(line)
                    continue
            elif index >= len(line):
                break
            elif not guessing and (streams := tokens.take_streams(line[index : min(turn, index + budget)], scheduled)):
                sequences += streams
                self.waiting.charge(streams, draws=True)
                budget -= len(streams)
                index += len(streams)
                continue
            elif not tokens.goes_on(line[index], index):
                index += 1  # no token is left or no block to be had; it keeps its place for the next step
                continue
            sequence = line[index]
            decodes = sequence.decodes
            share = 1
            if guessing or not decodes:
                # One token is left for each that runs behind this one.
                share = max(budget - (len(line) - index - 1), 1)
                if not decodes:
                    share = min(share, allowance.tokens(sequence.num_computed, sequence.account.claims))
                if not share:
                    index += 1  # in a later step
                    continue
            planned = tokens.take(sequence, share)
            self.waiting.charge([sequence], bool(planned.draws))
            scheduled.append(planned)
            sequences.append(sequence)
            budget -= len(planned.token_ids)
            if not decodes:
                allowance.take(planned.start, planned.count)
            index += 1
            if self._running.preemptions != preemptions:
                waiting, turn = None, len(line)
            elif sequence is waiting:
                waiting = self._next_waiting(index)  # now that it is known what this one costs
                turn = self._turn(waiting, index)
        if not scheduled:
            self.cache.cancel_step()
            self._running.line = before  # for other ranks make no plan where this one's is empty
            return StepPlan(())
        self.waiting.end_step()
        self._steps += 1
        self._in_flight.append(sequences)
        ended, self._ended = tuple(self._ended), []
        preempted, self._running.preempted = tuple(self._running.preempted), []
        return StepPlan(tuple(scheduled), ended, preempted, self.adapters.take_moves())

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceOutput]:
        """Enters the result of the oldest step in flight; returns the new tokens of each request that has any."""
        outputs: list[SequenceOutput] = []
        if not plan.sequences:
            return outputs
        self.cache.step_computed()
        self._budget.computed()
        sequences = self._in_flight.popleft()
        for sequence, planned, computed in zip(sequences, plan.sequences, result.sequences, strict=True):
            if planned.draws:
                sequence.num_pending -= 1
            if sequence.ended:
                continue
            if computed.prompt_logprobs:
                # After a preemption some come for a second time.
                sequence.prompt_logprobs += computed.prompt_logprobs[len(sequence.prompt_logprobs) - planned.start :]
            if computed.drawn:
                outputs.append(self._drawn(sequence, planned, computed))
            elif planned.embeds:
                outputs.append(self._embedded(sequence, computed))
        return outputs

    def undo(self, plans: list[StepPlan]) -> None:
        """Instead of `commit`, for all that is in flight, oldest first, when that first ran out of memory.

        Later steps are smaller, and no token is lost. All that run go back to the queue, also those that are in none
        of the plans: they may share blocks that these were to fill. What was computed before, the prefix cache has.
        """
        for sequences, plan in zip(self._in_flight, plans, strict=True):
            for sequence, planned in zip(sequences, plan.sequences, strict=True):
                sequence.num_pending -= bool(planned.draws)
            # The runner may not have got to these.
            self._ended += plan.ended
            self._running.preempted += plan.preempted
            self.adapters.move_again(plan.adapters)
        self._budget.out_of_memory(sum(planned.count for planned in plans[0].sequences))
        self._in_flight.clear()
        self.cache.forget_unwritten()
        self._undone += 1
        for sequence in [*reversed(self._running.line)]:
            self._running.preempt(sequence)

    def wanted_blocks(self, running: int) -> int:
        """That sequences have, and that those which wait would take now, if `running` may run."""
        waiting = islice(self.waiting.in_order(), max(running - len(self.running), 0))
        size = self.config.block_size
        return self.cache.pool.num_used + sum(blocks_of(sequence.num_known, size) for sequence in waiting)

    def resize(self, num_blocks: int) -> dict[int, int]:
        """Gives the KV cache so many blocks from the next plan on; which blocks' content has to move, and where to.

        Requests run on. If those in use are more than what is left, the last in order are preempted. No request may
        be accepted, or has been, that does not fit in alone: see `SchedulerConfig.least_blocks`.
        """
        if num_blocks < (least := self.config.least_blocks):
            raise BlockPoolError(f"{num_blocks} blocks are fewer than the {least} that one request may need")
        return self._running.resize(num_blocks)

    def likely_cached(self, sequence: Sequence) -> int:
        """Tokens of a new request that the prefix cache has now."""
        return len(self._running.cached(sequence)) * self.config.block_size

    def stats(self) -> EngineStats:
        size = self.config.block_size
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            blocks_total=self.cache.pool.num_blocks,
            blocks_free=self.cache.pool.num_free,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._running.preemptions,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            prefix_evictions=self.cache.evictions,
            blocks_cached=self.cache.num_cached,
            slots_unused=sum(len(s.block_table) * size - s.num_known for s in self.running),
            tokens_drafted=self._drafted,
            tokens_accepted=self._accepted,
            step_tokens=self._budget.tokens,
            steps_out_of_memory=self._undone,
        )

    def check_integrity(self) -> None:
        """Raises BlockPoolError if a block was lost or is owned twice. Walks all blocks: for tests."""
        self.cache.check_integrity(sequence.block_table for sequence in self.running)

    def _next_waiting(self, index: int) -> Sequence | None:
        """Whose turn it is, of those whose LoRA adapter has a slot or can have one, also of those from `index` on."""
        first = self.waiting.first()
        if first is None or self.adapters.can_run(first.adapter):
            return first
        tried: set[Account] = set()  # all of a tenant that have no slot can have the same

        def takes_one(sequence: Sequence) -> bool:
            if sequence.account in tried:
                return False
            tried.add(sequence.account)
            return bool(sharers(sequence, self._running.line, index))

        return self.adapters.first_admissible(self.waiting.in_order(), takes_one)

    def _turn(self, waiting: Sequence | None, index: int) -> int:
        """The place in the line, from `index` on, where one that waits gets its tokens; behind all if none does."""
        line = self._running.line
        if waiting is None:
            return len(line)
        return bisect_left(line, True, index, key=lambda running: goes_before(waiting, running))

    def _admit(self, sequence: Sequence, index: int, limit: int, allowance: Allowance) -> bool:
        """Moves a waiting sequence to place `index` of the running ones, if it fits and comes on in this step.

        If `limit` sequences run or more, it takes the place of another, or waits.
        """
        # A resize preempted it while a step in flight drew a token for it: how many it needs is known with that step.
        if sequence.num_pending:
            return False
        shared = self._running.cached(sequence)
        # Tokens behind a cached prefix are dearer than those of a prompt's beginning: there may be time for none.
        if not allowance.tokens(len(shared) * self.config.block_size, sequence.account.claims):
            return False
        # Each running sequence gets at least one token a step.
        max_running = min(self.config.max_running, self._budget.tokens, max(limit, len(self.running)))
        if not self._running.admit(sequence, index, shared, max_running):
            return False
        sequence.num_charged = max(sequence.num_charged, sequence.num_computed)
        if sequence.cached_tokens is None:  # else it was preempted, and what it finds now may be its own
            sequence.cached_tokens = sequence.num_computed
        if not sequence.num_generated:
            self._prefix_queries += sequence.num_known
            self._prefix_hits += sequence.num_computed
        return True

    def _end(self, sequence: Sequence) -> None:
        runs = sequence in self.running
        if runs:
            self._running.remove(sequence)
        self.waiting.end(sequence, runs)
        if sequence.adapter:
            self.adapters.leave(sequence.adapter)
        del self._by_id[sequence.request_id]
        sequence.ended = True
        self._ended.append(sequence.request_id)

    def _drawn(self, sequence: Sequence, planned: ScheduledSequence, computed: SequenceResult) -> SequenceOutput:
        if len(sequence.token_ids) == sequence.prompt_length:
            self._prompt_tokens += sequence.prompt_length
        drafts = planned.drafts
        output, num_right = accept(sequence, drafts, computed)
        if drafts:
            self._drafted += len(drafts)
            self._accepted += num_right
        self._generated_tokens += len(output.token_ids)
        if output.finish_reason:
            self._running.register(sequence)  # what was not known yet when it was planned
            self._end(sequence)
        return output

    def _embedded(self, sequence: Sequence, computed: SequenceResult) -> SequenceOutput:
        self._prompt_tokens += len(sequence.prompt_token_ids)
        self._end(sequence)
        return embedded(sequence, computed)
