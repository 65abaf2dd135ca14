"""The CPU kernels on a quantized cache: codes and scales to the bit, attention as the reference's in float32."""

from __future__ import annotations

import random

import pytest
import torch

from helpers.coded_cache import copied, random_cache, same
from helpers.rotation import no_rotation
from helpers.step_batches import Tokens, batch_of, in_order
from helpers.vectors import vectors
from tidewright.attention.base import Attention, AttentionLayer
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.cpu.attention import NativeCpuAttention
from tidewright.devices.cpu.kernels import KernelArgumentError
from tidewright.kv_cache.quantized import FP8, INT8
from tidewright.kv_cache.storage import LayerCache

pytestmark = pytest.mark.usefixtures("all_cores")

FP32, BF16 = torch.float32, torch.bfloat16
FORMATS = pytest.mark.parametrize("cache_dtype", [INT8, FP8])
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16])
CLOSE = {INT8: 2e-4, FP8: 3e-5}
"""Queries and weights have 16 bits beside int8; beside fp8, which is far less exact, weights may be bfloat16."""


def run(
    attention: Attention, cache: LayerCache, spans: list[Tokens], qkv_TXD: torch.Tensor, layer: AttentionLayer
) -> torch.Tensor:
    batch = batch_of(spans, cache.keys_NSKD.shape[1])
    attention.prepare(batch)
    return attention.forward(qkv_TXD, no_rotation(qkv_TXD), cache, batch, layer)


def steps(lengths: list[tuple[int, int]], block_size: int, shared: int = 0) -> tuple[list[Tokens], int]:
    """Sequences in the order of a batch, the first `shared` of which begin alike, and the number of blocks."""
    free = list(range(sum((start + count) // block_size + 1 for start, count in lengths)))
    blocks = len(free)
    random.Random(block_size).shuffle(free)
    spans = [Tokens(s, n, tuple(free.pop() for _ in range((s + n) // block_size + 1))) for s, n in lengths]
    for i in range(1, shared):
        common = min(lengths[0][0], lengths[i][0]) // block_size
        spans[i] = Tokens(*lengths[i], spans[0].block_table[:common] + spans[i].block_table[common:])
    return in_order(spans, block_size), blocks


def new_tokens(spans: list[Tokens], heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(sum(s.count for s in spans), heads, size, generator=torch.Generator().manual_seed(1)).to(dtype)


@FORMATS
@DTYPES
@pytest.mark.parametrize("size", [6, 48, 64, 80])
def test_codes_and_scales_are_those_of_the_definition(size: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Whatever the block size, and nothing else is touched."""
    kv_heads, tokens = 2, 40
    for block_size in (1, 16):
        spans = [Tokens(3, tokens, tuple(reversed(range(48 // block_size))))]
        ours = random_cache(cache_dtype, 48 // block_size, block_size, kv_heads, size)
        reference = copied(ours)
        k_TKD = vectors(tokens, kv_heads, size, dtype)
        q_TKD = torch.ones_like(k_TKD)
        qkv_TXD = torch.cat((q_TKD, k_TKD, k_TKD.flip(0)), dim=1)
        run(NativeCpuAttention(), ours, spans, qkv_TXD, AttentionLayer(1.0))
        run(ReferenceAttention(block_size, torch.device("cpu")), reference, spans, qkv_TXD, AttentionLayer(1.0))
        assert same(ours, reference)


@FORMATS
@DTYPES
@pytest.mark.parametrize(
    ("block_size", "kv_heads", "group", "size", "window", "softcap"),
    [
        (16, 3, 3, 64, None, None),
        (16, 1, 7, 80, 257, None),
        (32, 2, 1, 128, None, 1.5),
        (3, 2, 2, 20, 5, 1.5),
        (16, 1, 2, 256, 64, None),
        (1, 2, 3, 6, None, None),
    ],
)
def test_as_the_reference(
    block_size: int,
    kv_heads: int,
    group: int,
    size: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> None:
    layer = AttentionLayer(size**-0.5, window, softcap)
    lengths = [(600, 1), (520, 1), (700, 1), (63, 1), (0, 1), (300, 5), (0, 70), (255, 90), (1, 2)]
    spans, blocks = steps(lengths, block_size, shared=3)
    cache = random_cache(cache_dtype, blocks, block_size, kv_heads, size)
    qkv_TXD = new_tokens(spans, kv_heads * (group + 2), size, dtype)
    reference = ReferenceAttention(block_size, torch.device("cpu"))
    exact_THD = run(reference, copied(cache), spans, qkv_TXD.float(), layer)
    found_THD = run(NativeCpuAttention(), cache, spans, qkv_TXD, layer)
    assert found_THD.dtype == dtype
    close = CLOSE[cache_dtype] if dtype == FP32 else 4e-3 * float(exact_THD.abs().max())
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found_THD.float(), exact_THD, atol=close, rtol=rounding)


@FORMATS
@DTYPES
def test_a_sequence_gets_the_same_bits_in_any_company(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Alone and beside others, few rows and many, with shared blocks and with its own; in any number of threads."""
    layer = AttentionLayer(0.125)
    lengths = [(540 + i, 1) for i in range(20)] + [(700, 1), (5, 1), (600, 3), (0, 90)]
    spans, blocks = steps(lengths, 16, shared=20)
    cache = random_cache(cache_dtype, blocks, 16, 3, 64)
    qkv_TXD = new_tokens(spans, 15, 64, dtype)
    attention = NativeCpuAttention()
    together_THD = run(attention, cache, spans, qkv_TXD, layer)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(run(attention, cache, spans, qkv_TXD, layer), together_THD)
    finally:
        torch.set_num_threads(threads)
    first = 0
    for span in spans:
        rows = slice(first, first + span.count)
        first += span.count
        assert torch.equal(run(attention, cache, [span], qkv_TXD[rows], layer), together_THD[rows])


@FORMATS
def test_a_fault_is_seen_by_its_own_sequence_alone(cache_dtype: torch.dtype) -> None:
    """Also when the blocks go to another, which has not written all of them yet."""
    layer, attention = AttentionLayer(0.125), NativeCpuAttention()
    cache = random_cache(cache_dtype, 8, 16, 2, 64)
    qkv_TXD = new_tokens([Tokens(0, 20, (0, 1))], 8, 64, FP32)
    qkv_TXD[3, 4:] = torch.nan
    out_THD = run(attention, cache, [Tokens(0, 20, (0, 1))], qkv_TXD, layer)
    assert out_THD[3:].isnan().all()
    fine_TXD = new_tokens([Tokens(0, 2, (0,))], 8, 64, FP32)
    assert run(attention, cache, [Tokens(0, 2, (0,))], fine_TXD, layer).isfinite().all()
    fine_TXD[1, 0, 5] = torch.inf  # of a query
    out_THD = run(attention, cache, [Tokens(0, 2, (0,))], fine_TXD, layer)
    assert out_THD[1, 0].isnan().all()
    assert out_THD[0].isfinite().all()


def test_a_cache_without_its_scales_is_refused() -> None:
    cache = random_cache(INT8, 2, 16, 1, 64)
    qkv_TXD = torch.ones(1, 3, 64)
    for wrong in (LayerCache(cache.keys_NSKD, cache.values_NSKD), random_cache(torch.float16, 2, 16, 1, 64)):
        with pytest.raises(KernelArgumentError):
            run(NativeCpuAttention(), wrong, [Tokens(0, 1, (0,))], qkv_TXD, AttentionLayer(1.0))
