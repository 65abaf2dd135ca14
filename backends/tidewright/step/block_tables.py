"""The block tables of all running sequences, each in a row that it keeps while it runs."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

import numpy as np
import torch

from tidewright.engine.plan import ScheduledSequence
from tidewright.step.arena import Arena


def tables_arrays(updates: int) -> dict[str, tuple[np.dtype, int]]:
    """What BlockTables needs in the arena for up to `updates` new blocks in a step."""
    return {"tables.at": (np.dtype(np.int64), updates), "tables.block": (np.dtype(np.int32), updates)}


class BlockTables:
    """A sequence that only grew costs its new blocks, whatever its length.

    On a device with its own memory the new blocks travel in the arena and are scattered there; only when a step
    brings more of them than fit, as when long prompts are admitted, the whole table is copied.
    """

    def __init__(self, places: int, blocks: int, arena: Arena, device: torch.device, staged: bool) -> None:
        self._tables_PM = torch.zeros((places, blocks), dtype=torch.int32, pin_memory=device.type == "cuda")
        self.host_PM: np.ndarray = self._tables_PM.numpy()
        self.tables_PM = torch.zeros_like(self._tables_PM, device=device) if staged else self._tables_PM
        self._staged, self._arena = staged, arena
        self.highest_block = 0  # that any sequence has used
        self._updates = 0  # in this step
        self._lengths = [0] * places
        self._places: dict[int, int] = {}  # by request
        self._free = list(reversed(range(places)))
        # Sequences in the order of their tables at admission, which are unique: the last block is always their own.
        # As tables grow they stay in that order, so sequences with a common beginning stay side by side.
        self._order: list[tuple[bytes, int]] = []
        self._keys: list[bytes] = [b""] * places
        self._ranks: np.ndarray | None = None

    def ranks(self) -> np.ndarray:
        """By place: sorts sequences by their tables, so that those that begin with the same blocks lie side by side."""
        if self._ranks is None:
            self._ranks = np.zeros(len(self._lengths), np.int64)
            self._ranks[[place for _, place in self._order]] = np.arange(len(self._order))
        return self._ranks

    def begin(self, gone: Iterable[int]) -> None:
        """A new step, without these requests; unknown ones are ignored."""
        self._updates = 0
        for request_id in gone:
            place = self._places.pop(request_id, None)
            if place is not None:
                self._free.append(place)
                self._forget_key(place)

    def place(self, planned: ScheduledSequence) -> int:
        """The row of a sequence, with its new blocks in it."""
        place = self._places.get(planned.request_id)
        if place is None:
            place = self._places[planned.request_id] = self._free.pop()
            self._lengths[place] = 0
        if blocks := planned.new_blocks:
            first = planned.first_block
            if first == 0:
                self._set_key(place, blocks)
            elif first != self._lengths[place]:
                raise ValueError(
                    f"request {planned.request_id} has {self._lengths[place]} blocks, so the next is not number {first}"
                )
            self._write(place, first, blocks)
        return place

    def upload(self) -> None:
        """To be called behind the arena's upload."""
        if not self._staged or not self._updates:
            return
        at, block = self._arena.device["tables.at"], self._arena.device["tables.block"]
        if self._updates > len(at):
            self.tables_PM.copy_(self._tables_PM, non_blocking=True)
        else:
            self.tables_PM.view(-1).index_copy_(0, at[: self._updates], block[: self._updates])

    def _write(self, place: int, first: int, blocks: tuple[int, ...]) -> None:
        end = first + len(blocks)
        self._lengths[place] = end
        self.highest_block = max(self.highest_block, *blocks)
        self.host_PM[place, first:end] = blocks
        if self._staged:
            at, block = self._arena.host["tables.at"], self._arena.host["tables.block"]
            begin, self._updates = self._updates, self._updates + len(blocks)
            if self._updates <= len(at):
                start = place * self.host_PM.shape[1]
                at[begin : self._updates] = np.arange(start + first, start + end)
                block[begin : self._updates] = blocks

    def _set_key(self, place: int, blocks: tuple[int, ...]) -> None:
        key = np.array(blocks, dtype=">i4").tobytes()  # these sort as the numbers do
        if key != self._keys[place]:
            self._forget_key(place)
            self._keys[place] = key
            insort(self._order, (key, place))
            self._ranks = None

    def _forget_key(self, place: int) -> None:
        if self._keys[place]:
            del self._order[bisect_left(self._order, (self._keys[place], place))]
            self._keys[place] = b""
            self._ranks = None
