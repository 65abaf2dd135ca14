"""Counts of tokens for penalties, on the device, by the place that a running sequence has in the step's buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from tidewright.devices.cuda.launch import power_of_two
from tidewright.devices.cuda.sampling import DeviceCounts
from tidewright.step.sampling import SamplingBatch

_LEAST_ROWS = 8


class _Counted(NamedTuple):
    """What a row holds: the tokens of `token_ids` before `position`."""

    request_id: int
    token_ids: Sequence[int]
    position: int


class PlaceCounts:
    """A row is filled when its sequence first draws at its place; then each draw adds its token, on the device alone.

    Memory is taken when the first request with penalties comes, and for as many places as were used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counted: dict[int, _Counted] = {}  # by place
        self.counts: DeviceCounts | None = None

    def missing(self, batch: SamplingBatch) -> dict[str, np.ndarray]:
        """The prompts and outputs that `rows` will count, to be sent to the device."""
        arrays: dict[str, np.ndarray] = {}
        for row in np.flatnonzero(batch.host.is_penalised).tolist():
            draw, place = batch.draws[row], int(batch.host_places_R[row])
            history = draw.history
            counted = self._counted.get(place)
            if counted and counted.token_ids is history.token_ids and counted.position == draw.position:
                continue
            known = np.array(history.token_ids[: history.length], np.int64)
            arrays[f"prompt {place}"] = known[: history.prompt_length]
            arrays[f"output {place}"] = known[history.prompt_length :]
        return arrays

    def rows(self, batch: SamplingBatch, vocab_size: int, sent: dict[str, torch.Tensor]) -> torch.Tensor:
        """int32: the row of counts of each draw, or -1; with `sent` counted."""
        counts = self._room(1 + int(batch.host_places_R.max()), vocab_size)
        for name, prompt_ids in sent.items():
            kind, _, place = name.partition(" ")
            if kind == "prompt":
                self._counted.pop(int(place), None)  # if the step fails, it is nobody's
                counts.set(int(place), prompt_ids, sent[f"output {place}"])
        has_row_R = batch.device.is_penalised & (batch.places_R < len(counts.counts_NV))
        return torch.where(has_row_R, batch.places_R, -1).int()

    def add(self, batch: SamplingBatch, rows_R: torch.Tensor, tokens_R: torch.Tensor) -> None:
        """Counts what was drawn."""
        assert self.counts is not None
        self.counts.add(rows_R, tokens_R)
        for row in np.flatnonzero(batch.host.is_penalised).tolist():
            draw = batch.draws[row]
            counted = _Counted(draw.request_id, draw.history.token_ids, draw.position + 1)
            self._counted[int(batch.host_places_R[row])] = counted

    def doubt(self, batch: SamplingBatch) -> None:
        """What was drawn for these rows is not what was counted."""
        for place in batch.host_places_R.tolist():
            self._counted.pop(place, None)

    def forget(self, ended: Sequence[int]) -> None:
        if ended and self._counted:
            gone = {*ended}
            self._counted = {place: one for place, one in self._counted.items() if one.request_id not in gone}

    def _room(self, rows: int, vocab_size: int) -> DeviceCounts:
        before = self.counts
        if before is None or len(before.counts_NV) < rows:
            self.counts = DeviceCounts(max(power_of_two(rows), _LEAST_ROWS), vocab_size, self._device)
            if before is not None:
                self.counts.counts_NV[: len(before.counts_NV)] = before.counts_NV
        assert self.counts is not None
        return self.counts
