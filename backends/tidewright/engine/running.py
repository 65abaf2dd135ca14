"""The sequences that run, and the blocks that they hold: how one gets blocks, and which others are preempted for it.

Which one gets tokens, and when, is the scheduler's choice (scheduler.py). Pure, like it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from tidewright.engine.adapter_turns import sharers
from tidewright.engine.fairness import FairQueue
from tidewright.engine.limits import SchedulerConfig
from tidewright.engine.sequence import Sequence
from tidewright.engine.victims import victims
from tidewright.kv_cache.budget import blocks_of
from tidewright.kv_cache.prefix_cache import HashChain, PrefixCache
from tidewright.lora.slots import AdapterSlots


class RunningSequences:
    """In `line`, the first has the first claim to tokens and blocks; those that are preempted go to `waiting`."""

    def __init__(self, config: SchedulerConfig, cache: PrefixCache, adapters: AdapterSlots, waiting: FairQueue) -> None:
        self._config, self._cache, self._adapters, self._waiting = config, cache, adapters, waiting
        self.line: list[Sequence] = []
        self.preempted: list[int] = []  # requests, since the last plan
        self.preemptions = 0

    @property
    def spare_blocks(self) -> int:
        """That no sequence has, less one for each that runs: it would soon be preempted for lack of it."""
        return self._cache.pool.num_free - len(self.line)

    def cached(self, sequence: Sequence) -> list[int]:
        """Blocks of the prefix cache that hold the beginning of one that waits."""
        # Prompt log-probabilities need all of the prompt's hidden states, also those that a cached block would skip.
        if sequence.sampling.prompt_logprobs is not None:
            return []
        return self._cache.find(sequence.token_ids, self._chain(sequence))

    def admit(self, sequence: Sequence, index: int, shared: list[int], max_running: int) -> bool:
        """Moves one that waits to place `index`, with its blocks: the `shared` ones, and as many more as it needs.

        One block is left for each running sequence: without it, the new one would soon be preempted again. Where
        `max_running` run, the new one takes the place of another, and where its LoRA adapter has no slot, that of all
        that share one. False if it does not fit.
        """
        needed = self._blocks(sequence.num_known) - len(shared)
        # Those from `index` on are not yet part of this step.
        size = max_running, self._cache.pool.num_blocks
        has_slot = self._adapters.can_run(sequence.adapter)
        leaving = [] if has_slot else sharers(sequence, self.line, index)
        if not has_slot and not leaving:
            return False
        staying = [other for other in self.line if other not in leaving] if leaving else self.line
        others = chain(leaving, victims(sequence, staying, index, needed + len(shared), size))
        most = min(max_running - 1, len(staying))
        if not self._make_room(others, shared, needed, lambda left, running: running <= min(left, most)):
            return False
        self._waiting.begin(sequence)
        self.line.insert(index, sequence)
        if sequence.adapter:
            sequence.adapter_slot = self._adapters.acquire(sequence.adapter)
        sequence.block_table = self._cache.take(shared, needed)
        sequence.num_registered = len(shared)
        sequence.num_computed = len(shared) * self._config.block_size
        return True

    def grow(self, sequence: Sequence, index: int) -> bool:
        """Gets blocks for all its tokens, from the last in order if need be; False if even that fails.

        The first never fails, for `check_request` made sure that it fits in alone: so there is always progress.
        """
        needed = self._blocks(sequence.num_expected) - len(sequence.block_table)
        if needed <= 0:
            return True
        if not self._make_room(reversed(self.line[index + 1 :]), [], needed, lambda left, _: left >= 0):
            return False
        sequence.block_table += self._cache.take([], needed)
        return True

    def grow_by(self, sequence: Sequence, count: int) -> bool:
        """Gets blocks for so many tokens beyond those that it knows, if that costs nobody else one."""
        needed = self._blocks(sequence.num_known + count) - len(sequence.block_table)
        if needed > self.spare_blocks:
            return False
        if needed > 0:
            sequence.block_table += self._cache.take([], needed)
        return True

    def register(self, sequence: Sequence) -> None:
        """Lets others find its full blocks."""
        end = min(sequence.num_computed, sequence.num_known)
        sequence.num_registered = self._cache.register(
            sequence.block_table, sequence.token_ids, end, self._chain(sequence), sequence.num_registered
        )

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue; what the prefix cache does not keep of it is computed anew later."""
        self.remove(sequence)
        sequence.yields_from = sequence.num_known + self._config.block_size
        self._waiting.preempt(sequence)
        self.preemptions += 1
        self.preempted.append(sequence.request_id)

    def remove(self, sequence: Sequence) -> None:
        """It runs no more, and gives back what it has."""
        self.line.remove(sequence)
        self._cache.free(sequence.block_table, sequence.sampling.tenant)
        sequence.block_table = []
        if sequence.adapter_slot >= 0:
            self._adapters.release(sequence.adapter)
            sequence.adapter_slot = -1
        sequence.num_computed = sequence.num_registered = sequence.num_planned_blocks = 0

    def resize(self, num_blocks: int) -> dict[int, int]:
        """As Scheduler.resize says; the last in order are preempted if their blocks are more than what is left."""
        while self._cache.pool.num_used > num_blocks:
            self.preempt(self.line[-1])
        moves = self._cache.resize(num_blocks)
        for sequence in self.line if moves else ():
            if not moves.keys().isdisjoint(sequence.block_table):
                sequence.block_table = [moves.get(block, block) for block in sequence.block_table]
                sequence.num_planned_blocks = 0  # the next plan has its whole table
        return moves

    def _make_room(
        self, others: Iterable[Sequence], shared: list[int], needed: int, fits: Callable[[int, int], bool]
    ) -> bool:
        """Preempts `others`, one after the other, until `fits`; preempts none if that never comes.

        `fits` gets the blocks that are left once `shared` and `needed` more are taken, and the number that still run.
        """
        chosen: list[Sequence] = []

        def tables() -> Iterator[list[int]]:
            for other in others:
                chosen.append(other)
                yield other.block_table

        for left in self._cache.free_after(shared, needed, tables()):
            if fits(left, len(self.line) - len(chosen)):
                break
        else:
            return False
        for other in chosen:
            self.preempt(other)
        return True

    def _blocks(self, num_tokens: int) -> int:
        return blocks_of(num_tokens, self._config.block_size)

    def _chain(self, sequence: Sequence) -> HashChain:
        if sequence.chain is not None:
            return sequence.chain
        salt, tenant, size = sequence.sampling.cache_salt, sequence.sampling.tenant, self._config.block_size
        adapter = self._adapters.digest(sequence.adapter) or ""
        sequence.chain = HashChain(salt, size, self._config.cache_format, tenant, adapter)
        return sequence.chain
