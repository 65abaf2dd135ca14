"""Vectors to quantize: random ones of all sizes, and what is special."""

from __future__ import annotations

import torch

EXTREMES = (
    [0.0],
    [-0.0, 0.0],
    [1.0],
    [-448.0, 127.0, 63.5, -0.5],
    [448.0, 2.0**-6, 2.0**-7, -(2.0**-7) * 1.01, 0.5 * 2.0**-7, 2.0**-9],
    [1e-38, -1e-39],
    [2.0**-100, -(2.0**-101)],
    [3.3e38, -1.0],
    [float("nan"), 1.0],
    [float("inf"), 1.0],
    [-float("inf")],
    [1.0, float("nan"), float("inf")],
)
"""Beginnings of vectors of zeros."""


def vectors(tokens: int, heads: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """x_TKD; the first head of the last tokens has the extremes."""
    generator = torch.Generator().manual_seed(size)
    x_TKD = torch.randn(tokens, heads, size, generator=generator)
    x_TKD *= 10.0 ** torch.randint(-4, 5, (tokens, heads, 1), generator=generator)
    for i, beginning in enumerate(EXTREMES):
        if i < tokens:
            x_TKD[-1 - i, 0] = torch.tensor(beginning + [0.0] * size)[:size]
    return x_TKD.to(dtype)
