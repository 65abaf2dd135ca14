"""A rotation by no angle, for tests of attention alone."""

from __future__ import annotations

import torch

from tidewright.attention.base import Rotation


def no_rotation(qkv_TXD: torch.Tensor) -> Rotation:
    tokens, _, size = qkv_TXD.shape
    # Each token has a row of its own: which rows are read is seen by others' tests.
    return Rotation(torch.ones(tokens, size), torch.zeros(tokens, size), torch.arange(tokens))
