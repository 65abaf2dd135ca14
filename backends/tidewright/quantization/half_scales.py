"""Scales and offsets of groups as float16 times a power of two for each output: those that a checkpoint has in 16 bits
stay exact.
"""

from __future__ import annotations

import torch

_LARGEST_POWER = 120  # of the factors: a product with a float16 is still a float32


def as_halves(
    scales_FG: torch.Tensor, offsets_FG: torch.Tensor | None, largest_exponent: int, offset_share: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Factors_F, float32, and what scales and offsets are, divided by them.

    The largest of an output's scales, or of `offset_share` times its offsets, becomes less than 2^largest_exponent.
    """
    largest_F = scales_FG.abs().amax(1)
    if offsets_FG is not None:
        largest_F = torch.maximum(largest_F, offsets_FG.abs().amax(1) * offset_share)
    exponents_F = torch.frexp(largest_F).exponent - largest_exponent
    factors_F = torch.ldexp(torch.ones_like(largest_F), exponents_F.clamp(-_LARGEST_POWER, _LARGEST_POWER))
    offsets = None if offsets_FG is None else (offsets_FG / factors_F[:, None]).half()
    return factors_F, (scales_FG / factors_F[:, None]).half(), offsets
