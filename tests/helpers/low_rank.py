"""Low-rank updates of a layer, and what numpy says of them in float64."""

from __future__ import annotations

import numpy as np
import torch

from tidewright.lora.adapter import LowRank
from tidewright.lora.layer import LoraLayer

DEPTH, FEATURES, SLOTS, MOST_RANK = 75, (133, 16, 40), 3, 9
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def updates(dtype: torch.dtype) -> list[list[LowRank | None]]:
    """Ranks that fill no tile; one projection of one adapter is not adapted."""
    generator = torch.Generator().manual_seed(1)

    def update(rank: int, features: int) -> LowRank:
        a_RE, b_RF = (torch.randn(rank, size, generator=generator).to(dtype) for size in (DEPTH, features))
        return LowRank(a_RE, b_RF, 0.37, rank)

    made: list[list[LowRank | None]] = []
    for ranks in ((4, 1, 9), (7, 0, 2), (8, 3, 5)):
        made.append([update(rank, size) if rank else None for rank, size in zip(ranks, FEATURES, strict=True)])
    return made


def fill(lora: LoraLayer, made: list[list[LowRank | None]]) -> None:
    for slot, parts in enumerate(made):
        lora.put(slot, [part and lora.arranged(part) for part in parts])


def expected(x: torch.Tensor, y: torch.Tensor, slots: list[int], made: list[list[LowRank | None]]) -> np.ndarray:
    result = y.double().numpy().copy()
    for row, slot in enumerate(slots):
        first = 0
        for part, size in zip(made[slot], FEATURES, strict=True) if slot >= 0 else ():
            if part:
                a, b = part.a_RE.double().numpy(), part.b_RF.double().numpy()
                result[row, first : first + size] += part.scale * (x[row].double().numpy() @ a.T) @ b
            first += size
    return result
