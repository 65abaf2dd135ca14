"""Persistent buffers of a step, and how a plan gets into them: what stays the same from step to step is not written."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from tidewright.engine.plan import PENDING, ScheduledSequence, StepPlan
from tidewright.step.adapters import AdapterColumn, adapter_arrays
from tidewright.step.arena import Arena
from tidewright.step.batch import StepBatch
from tidewright.step.block_tables import BlockTables, tables_arrays
from tidewright.step.sampling import SamplingColumns, sampling_arrays

_INT, _LONG = np.dtype(np.int32), np.dtype(np.int64)


@dataclass(frozen=True)
class StepLimits:
    """The scheduler's: they bound all buffers."""

    max_running: int
    max_batched_tokens: int
    max_model_len: int
    block_size: int
    adapter_slots: int = 0


@dataclass(eq=False)
class _Decodes:
    """A step that computed one token of each sequence, and drew the next."""

    sequences: tuple[ScheduledSequence, ...]
    order: list[int]  # of the plan's sequences in the batch
    sorted_places_B: np.ndarray  # in the batch's order
    places_B: np.ndarray  # in the plan's order
    batch: StepBatch

    def go_on_with(self, plan: StepPlan) -> bool:
        """The plan is the next token of the same sequences, and of no other."""
        if plan.ended or plan.preempted or len(plan.sequences) != len(self.sequences):
            return False
        for planned, before in zip(plan.sequences, self.sequences, strict=True):
            if planned.request_id != before.request_id or planned.start != before.start + 1:
                return False
            if len(planned.token_ids) != 1 or len(planned.draws) != 1:
                return False
            if planned.new_blocks and planned.first_block == 0:
                return False
        return True


class StepBuffers:
    """Every plan has to pass through `fill`, in order: a plan carries only the blocks that are new since the last."""

    def __init__(
        self, limits: StepLimits, device: torch.device, staged: bool | None = None, sizes: Sequence[int] = ()
    ) -> None:
        """`staged`: host and device have memory of their own; by default, unless the device is the CPU.

        A step of single tokens is padded to the next of `sizes`, in order, which are `max_running` at most.
        """
        staged = device.type != "cpu" if staged is None else staged
        tokens, block_size = limits.max_batched_tokens, limits.block_size
        places = min(limits.max_running, tokens)
        blocks = -(-limits.max_model_len // block_size)
        arrays: dict[str, tuple[np.dtype, int]] = {
            "token_ids": (_LONG, tokens),
            "positions": (_LONG, tokens),
            "slots": (_LONG, tokens),
            "rows": (_LONG, tokens),
            "places": (_LONG, places),
            "pending_rows": (_LONG, places),
            "pending_places": (_LONG, places),
            "lengths": (_INT, places),
            "spans": (_INT, 4 * places),
            # The tokens of a step fill so many blocks, and one more of each sequence whose last block was partly full.
            **tables_arrays(-(-tokens // block_size) + places),
            **sampling_arrays(tokens),
            **adapter_arrays(tokens, limits.adapter_slots),
        }
        self._block_size, self.sizes = block_size, sizes
        self._arena = Arena(arrays, device, staged)
        self._tables = BlockTables(places, blocks, self._arena, device, staged)
        self._sampling = SamplingColumns(places, self._arena)
        self._adapters = AdapterColumn(self._arena, limits.adapter_slots)
        self.has_adapters = limits.adapter_slots > 0
        self._uploaded = torch.cuda.Event() if device.type == "cuda" else None
        # The last token that was drawn for the sequence at each place, so that a step can take it as input that is
        # launched before the host knows it. The last entry is for tokens after which the same step draws another.
        self.last_tokens_P = torch.zeros(places + 1, dtype=torch.int64, device=device)
        self._last: _Decodes | None = None  # what the buffers hold, if it can go on

    @property
    def highest_block(self) -> int:
        """Of all blocks that sequences have used so far."""
        return self._tables.highest_block

    def forget_blocks(self, first: int) -> None:
        """From number `first` on they are as if they had never been used."""
        self._tables.highest_block = min(self._tables.highest_block, first - 1)

    def fill(self, plan: StepPlan) -> StepBatch:
        if self._last and self._last.go_on_with(plan):
            return self._advance(self._last, plan)
        return self._fill(plan, self._padded_size(plan))

    def decodes(self, size: int, adapted: bool = False) -> StepBatch:
        """Padding alone: what every step sees that is padded to this size, before it is filled.

        `adapted`: a step in which some rows have a LoRA adapter.
        """
        self._await_upload()
        adapters = self._adapters.padding(size) if adapted else None
        batch, on_device = self._fill(StepPlan(()), size), self._arena.device
        return replace(
            batch,
            adapters=adapters,
            token_ids_T=on_device["token_ids"][:size],
            positions_T=on_device["positions"][:size],
            slots_T=on_device["slots"][:size],
            spans_B4=on_device["spans"].view(-1, 4)[:size],
            places_B=on_device["places"][:size],
            lengths_B=on_device["lengths"][:size],
            host_spans_B4=self._arena.host["spans"].reshape(-1, 4)[:size],
            num_decodes=size,
        )

    def _padded_size(self, plan: StepPlan) -> int:
        """0: it is not padded."""
        count = len(plan.sequences)
        if not count or any(len(planned.token_ids) != 1 for planned in plan.sequences):
            return 0
        at = bisect_left(self.sizes, count)
        return self.sizes[at] if at < len(self.sizes) else 0

    def _fill(self, plan: StepPlan, padded_to: int) -> StepBatch:
        self._await_upload()
        tables, sequences, host = self._tables, plan.sequences, self._arena.host
        tables.begin((*plan.ended, *plan.preempted))
        places_B = np.array([tables.place(planned) for planned in sequences], np.int64)
        starts_B = np.array([planned.start for planned in sequences], np.int64)
        counts_B = np.array([len(planned.token_ids) for planned in sequences], np.int64)

        # From the plan's order to the batch's: single tokens first, and of each kind by table.
        several_B = counts_B > 1
        ranks_P = tables.ranks()
        order_B = np.argsort(ranks_P[places_B] + several_B * len(ranks_P))
        sorted_places_B, sorted_starts_B, sorted_counts_B = places_B[order_B], starts_B[order_B], counts_B[order_B]
        sorted_ends_B = np.cumsum(sorted_counts_B)
        ends_B = np.empty_like(sorted_ends_B)
        ends_B[order_B] = sorted_ends_B

        num_sequences = len(sequences)
        spans_B4 = host["spans"].reshape(-1, 4)[:num_sequences]
        spans_B4[:, 0] = sorted_ends_B - sorted_counts_B
        spans_B4[:, 1] = sorted_starts_B
        spans_B4[:, 2] = sorted_counts_B
        spans_B4[:, 3] = sorted_places_B * tables.host_PM.shape[1]
        host["places"][:num_sequences] = sorted_places_B
        host["lengths"][:num_sequences] = sorted_starts_B + sorted_counts_B

        token_ids = list(chain.from_iterable(sequences[i].token_ids for i in order_B.tolist()))
        num_tokens, size = len(token_ids), self._block_size
        host["token_ids"][:num_tokens] = token_ids
        positions_T = host["positions"][:num_tokens]
        positions_T[:] = _ranges(sorted_starts_B, sorted_counts_B)
        places_T = np.repeat(sorted_places_B, sorted_counts_B)
        blocks_T = tables.host_PM[places_T, positions_T // size]
        host["slots"][:num_tokens] = blocks_T.astype(np.int64) * size + positions_T % size

        draws = [draw for planned in sequences for draw in planned.draws]
        num_draws_B = np.array([len(planned.draws) for planned in sequences], np.int64)
        host["rows"][: len(draws)] = _ranges(ends_B - num_draws_B, num_draws_B)
        sampling = self._sampling.gather(draws, np.repeat(places_B, num_draws_B))

        adapters = None
        if any(planned.adapter >= 0 for planned in sequences):
            adapters_B = np.array([sequences[i].adapter for i in order_B.tolist()], np.int32)
            adapters = self._adapters.gather(np.repeat(adapters_B, sorted_counts_B), padded_to)

        if padded_to:
            self._pad(num_sequences, padded_to)
        self._upload(token_ids, places_T)
        on_device = self._arena.device
        batch = StepBatch(
            token_ids_T=on_device["token_ids"][:num_tokens],
            positions_T=on_device["positions"][:num_tokens],
            slots_T=on_device["slots"][:num_tokens],
            spans_B4=on_device["spans"].view(-1, 4)[:num_sequences],
            places_B=on_device["places"][:num_sequences],
            lengths_B=on_device["lengths"][:num_sequences],
            tables_PM=tables.tables_PM,
            rows_R=on_device["rows"][: len(draws)],
            sampling=sampling,
            host_spans_B4=spans_B4,
            num_decodes=num_sequences - int(np.count_nonzero(several_B)),
            end_rows=ends_B.tolist(),
            max_context=tables.host_PM.shape[1] * self._block_size,
            padded_to=padded_to,
            adapters=adapters,
        )
        can_go_on = num_sequences > 0 and not several_B.any() and bool((num_draws_B == 1).all())
        self._last = _Decodes(sequences, order_B.tolist(), sorted_places_B, places_B, batch) if can_go_on else None
        return batch

    def _advance(self, last: _Decodes, plan: StepPlan) -> StepBatch:
        """As `_fill`, but writes only what changes when each sequence of the last step goes on by a token."""
        self._await_upload()
        tables, sequences, host, size = self._tables, plan.sequences, self._arena.host, self._block_size
        tables.begin(())
        for planned in sequences:
            if planned.new_blocks:
                tables.place(planned)
        count = len(sequences)
        token_ids = [sequences[i].token_ids[0] for i in last.order]
        host["token_ids"][:count] = token_ids
        positions_B, slots_B = host["positions"][:count], host["slots"][:count]
        positions_B += 1
        slots_B += 1
        host["lengths"][:count] += 1
        last.batch.host_spans_B4[:, 1] += 1
        first_B = np.flatnonzero(positions_B % size == 0)  # those that begin a block
        if len(first_B):
            blocks_B = tables.host_PM[last.sorted_places_B[first_B], positions_B[first_B] // size]
            slots_B[first_B] = blocks_B.astype(np.int64) * size
        sampling = self._sampling.advance(last.batch.sampling, [planned.draws[0] for planned in sequences])
        self._upload(token_ids, last.sorted_places_B)
        last.sequences, last.batch = sequences, replace(last.batch, sampling=sampling)
        return last.batch

    def _await_upload(self) -> None:
        """The host writes again what the last step may not have sent yet."""
        if self._uploaded:
            self._uploaded.synchronize()

    def _upload(self, token_ids: list[int], places_T: np.ndarray) -> None:
        """Sends the buffers to the device, and puts the tokens there that the host does not know yet."""
        host, on_device = self._arena.host, self._arena.device
        pending = [row for row, token in enumerate(token_ids) if token == PENDING] if PENDING in token_ids else []
        if count := len(pending):
            host["pending_rows"][:count] = pending
            host["pending_places"][:count] = places_T[pending]
        self._arena.upload()
        self._tables.upload()
        if self._uploaded:
            self._uploaded.record(torch.cuda.current_stream(self.last_tokens_P.device))
        if count:
            tokens_N = self.last_tokens_P[on_device["pending_places"][:count]]
            on_device["token_ids"].index_copy_(0, on_device["pending_rows"][:count], tokens_N)

    def _pad(self, first: int, end: int) -> None:
        """Rows of single tokens that attend to nothing, and that no cache keeps."""
        host = self._arena.host
        for name, value in (("token_ids", 0), ("positions", 0), ("slots", -1), ("places", 0), ("lengths", 0)):
            host[name][first:end] = value
        spans_B4 = host["spans"].reshape(-1, 4)
        spans_B4[first:end] = 0
        spans_B4[first:end, 0] = np.arange(first, end)
        spans_B4[first:end, 2] = 1

    def keep(self, batch: StepBatch, tokens_R: torch.Tensor) -> None:
        """Puts the tokens that were drawn after the rows of a batch into `last_tokens_P`."""
        self.last_tokens_P.index_copy_(0, batch.sampling.places_R, tokens_R)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, … of each pair, one after the other."""
    total = int(counts.sum())
    if total == len(counts) and counts.all():
        return starts  # one each, as in most steps
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(total)
