"""What adapters add to one linear layer, by slot; here in plain torch, for any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tidewright.lora.adapter import LowRank, Update
from tidewright.step.adapters import AdapterRows

Parts = Sequence[Update | None]
"""Of a layer that is several projections of one input; None: the adapter leaves that one as it is."""


class LoraLayer(nn.Module):
    def __init__(self, part_features: Sequence[int], slots: int) -> None:
        """`part_features`: outputs of each projection, which lie side by side."""
        super().__init__()
        self._slots: list[Parts] = [()] * slots
        ends = [sum(part_features[: number + 1]) for number in range(len(part_features))]
        self._features = [slice(end - count, end) for end, count in zip(ends, part_features, strict=True)]

    def arranged(self, update: LowRank) -> Update:
        """For `put`; called beside all else."""
        return Update(update.a_RE, update.b_RF, update.scale, update.rank)

    def put(self, slot: int, parts: Parts) -> None:
        """Lets the slot hold these from the next step on."""
        self._slots[slot] = parts

    def clear(self, slot: int) -> None:
        """Nothing is in the slot any more."""
        self.put(slot, ())

    def add(self, x_TE: torch.Tensor, y_TF: torch.Tensor, adapters: AdapterRows) -> None:
        """Adds to the rows of y = x w^T what their adapters say. Sums are in float32, rounded once."""
        for slot, first, count in adapters.host_tiles_M3.tolist():
            rows = adapters.rows_N[first : first + count].long()
            for own, part in zip(self._features, self._slots[slot], strict=False):
                if part:
                    h_NR = x_TE[rows].float() @ part.a.to(x_TE.device, torch.float32).t() * part.scale
                    added_NF = h_NR @ part.b.to(x_TE.device, torch.float32)
                    y_TF[rows, own] = (y_TF[rows, own].float() + added_NF).to(y_TF.dtype)
