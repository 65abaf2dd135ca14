"""Rotary position embedding: cosines and sines computed once, applied to q and k of every layer."""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

import math

import torch
from torch import nn

from tidewright.models.config import Llama3Scaling, LlamaConfig


class RotaryEmbedding(nn.Module):
    cos_PD: torch.Tensor
    sin_PD: torch.Tensor

    def __init__(self, config: LlamaConfig, max_positions: int) -> None:
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies = 1.0 / config.rope_theta**exponents
        if config.rope_scaling:
            frequencies = _stretch(frequencies, config.rope_scaling)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
        self.register_buffer("cos_PD", torch.cat((angles.cos(), angles.cos()), dim=-1))
        # The minus sign of a rotation's first half, put here once instead of into every layer.
        self.register_buffer("sin_PD", torch.cat((-angles.sin(), angles.sin()), dim=-1))

    def forward(self, positions_T: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos_T1D and sin_T1D for `rotate`."""
        return self.cos_PD[positions_T, None].to(dtype), self.sin_PD[positions_T, None].to(dtype)


def rotate(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    first, second = x_THD.chunk(2, dim=-1)
    return torch.addcmul(x_THD * cos_T1D, torch.cat((second, first), dim=-1), sin_T1D)


def _stretch(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Slow rotations are slowed down by `factor`, fast ones kept, those between blended."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)
