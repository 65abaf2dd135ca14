"""devices/cuda/rope_and_cache.py, interpreted on the CPU, against a rotation of complex numbers in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.interpreted import interpreted
from tidewright.attention.base import Rotation
from tidewright.kv_cache.storage import LayerCache
from tidewright.layers.rotary import RotaryEmbedding
from tidewright.models.config import Rope

with interpreted():
    from tidewright.devices.cuda.rope_and_cache import rotate_and_store

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
THETA = 10000.0
POSITIONS = (0, 1, 7, 99, 5)
SLOTS = (35, 0, -1, 63, 16)  # in no order; one row is padding
UNTOUCHED = 7.0


def rotation(head_dim: int) -> Rotation:
    embedding = RotaryEmbedding(Rope(THETA), head_dim, 100)
    return embedding(torch.tensor(POSITIONS))


def turned(x_THD: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + D/2) are complex numbers, which a position turns by its angle."""
    first, second = np.split(x_THD.double().numpy(), 2, axis=-1)
    half = first.shape[-1]
    angles = np.outer(POSITIONS, THETA ** -(np.arange(half) / half))
    numbers = (first + 1j * second) * np.exp(1j * angles)[:, None]
    return torch.from_numpy(np.concatenate([numbers.real, numbers.imag], axis=-1))


def check(
    heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, cache: torch.Tensor | None = None
) -> None:
    """`cache`: [N, 2, S, K, D], of which keys and values are two slices. Its first block belongs to someone else."""
    if cache is None:
        cache = torch.empty((2, 1 + 64 // block_size, block_size, kv_heads, head_dim), dtype=dtype).transpose(0, 1)
    cache.fill_(UNTOUCHED)
    k_cache, v_cache = cache[1:].unbind(1)
    all_heads = heads + 2 * kv_heads
    wide_TXD = torch.randn((5, all_heads + 1, head_dim), generator=torch.Generator().manual_seed(head_dim)).to(dtype)
    qkv_TXD = wide_TXD[:, :all_heads]  # rows lie a stride apart
    tables = rotation(head_dim)
    slots_T = torch.tensor(SLOTS)
    q_THD = rotate_and_store(
        qkv_TXD, tables.cos_PD, tables.sin_PD, tables.positions_T, slots_T, LayerCache(k_cache, v_cache)
    )

    q, k, v = qkv_TXD.split((heads, kv_heads, kv_heads), dim=1)
    assert q_THD.dtype == dtype
    torch.testing.assert_close(q_THD.double(), turned(q), rtol=torch.finfo(dtype).eps / 2, atol=2e-5)
    stored = torch.tensor([slot >= 0 for slot in SLOTS])
    for found, expected in ((k_cache, turned(k)), (v_cache, v.double())):
        slots = found.double().flatten(0, 1)
        torch.testing.assert_close(
            slots[slots_T[stored]], expected[stored], rtol=torch.finfo(k_cache.dtype).eps / 2, atol=2e-5
        )
        slots[slots_T[stored]] = UNTOUCHED
        assert bool((slots == UNTOUCHED).all())
    assert bool((cache[0] == UNTOUCHED).all())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "dtype"),
    [
        (2, 2, 64, 16, FP32),
        (3, 1, 80, 32, BF16),
        (8, 2, 96, 16, FP16),
        (8, 1, 128, 16, BF16),
        (2, 1, 256, 32, FP32),
    ],
)
def test_queries_keys_and_values(heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    check(heads, kv_heads, head_dim, block_size, dtype)


def test_a_cache_of_another_type_whose_blocks_hold_keys_and_values_side_by_side() -> None:
    check(3, 1, 64, 16, FP32, torch.empty((5, 2, 16, 1, 64), dtype=BF16))


def test_no_rows() -> None:
    cache = LayerCache(*torch.zeros((2, 1, 16, 1, 64)))
    tables = rotation(64)
    nothing = torch.empty(0, dtype=torch.int64)
    q_THD = rotate_and_store(torch.empty((0, 4, 64)), tables.cos_PD, tables.sin_PD, nothing, nothing, cache)
    assert q_THD.shape == (0, 2, 64)
