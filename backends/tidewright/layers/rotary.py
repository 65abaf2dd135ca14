"""Cosines and sines of the rotary position embedding, computed once; attention applies them to q and k."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

import math

import torch
from torch import nn

from tidewright.attention.base import Rotation
from tidewright.models.config import LinearScaling, Llama3Scaling, Rope


class RotaryEmbedding(nn.Module):
    cos_PD: torch.Tensor
    sin_PD: torch.Tensor

    def __init__(self, rope: Rope, head_dim: int, max_positions: int) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = _scaled(1.0 / rope.theta**exponents, rope.scaling)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
        self.register_buffer("cos_PD", torch.cat((angles.cos(), angles.cos()), dim=-1))
        # The minus sign of a rotation's first half, put here once instead of into every layer.
        self.register_buffer("sin_PD", torch.cat((-angles.sin(), angles.sin()), dim=-1))

    def forward(self, positions_T: torch.Tensor) -> Rotation:
        return Rotation(self.cos_PD, self.sin_PD, positions_T)


def _scaled(frequencies: torch.Tensor, scaling: Llama3Scaling | LinearScaling | None) -> torch.Tensor:
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    # Slow rotations are slowed down by `factor`, fast ones kept, those between blended.
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)
