"""attention/reference.py on a quantized cache: as on a plain cache of the numbers that it stands for."""

from __future__ import annotations

import pytest
import torch

from helpers.coded_cache import copied, plain, random_cache, same
from helpers.rotation import no_rotation
from helpers.step_batches import Tokens, batch_of, in_order
from tidewright.attention.base import AttentionLayer
from tidewright.attention.reference import ReferenceAttention
from tidewright.kv_cache.quantized import FP8, INT8, dequantize, quantize
from tidewright.kv_cache.storage import LayerCache

HEADS, KV_HEADS, SIZE, BLOCK_SIZE = 4, 2, 12, 4
LAYER = AttentionLayer(SIZE**-0.5)


def run(cache: LayerCache, spans: list[Tokens], qkv_TXD: torch.Tensor) -> torch.Tensor:
    attention, batch = ReferenceAttention(BLOCK_SIZE, torch.device("cpu")), batch_of(spans, BLOCK_SIZE)
    attention.prepare(batch)
    return attention.forward(qkv_TXD, no_rotation(qkv_TXD), cache, batch, LAYER)


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_as_with_the_numbers_that_the_codes_stand_for(dtype: torch.dtype) -> None:
    spans = in_order([Tokens(9, 1, (0, 1, 2)), Tokens(0, 7, (3, 4)), Tokens(5, 6, (7, 6, 5))], BLOCK_SIZE)
    cache = random_cache(dtype, 9, BLOCK_SIZE, KV_HEADS, SIZE)
    qkv_TXD = torch.randn(14, HEADS + 2 * KV_HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    numbers = plain(cache, torch.float32)
    found_THD = run(cache, spans, qkv_TXD)
    stored_TXD = qkv_TXD.clone()
    stored_TXD[:, HEADS:] = dequantize(*quantize(qkv_TXD[:, HEADS:], dtype), torch.float32)
    torch.testing.assert_close(found_THD, run(numbers, spans, stored_TXD))
    after = plain(cache, torch.float32)
    assert torch.equal(after.keys_NSKD, numbers.keys_NSKD)
    assert torch.equal(after.values_NSKD, numbers.values_NSKD)


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_a_prompt_in_chunks_leaves_the_same_codes_and_result(dtype: torch.dtype) -> None:
    qkv_TXD = torch.randn(11, HEADS + 2 * KV_HEADS, SIZE, generator=torch.Generator().manual_seed(2))
    whole = random_cache(dtype, 3, BLOCK_SIZE, KV_HEADS, SIZE)
    in_chunks = copied(whole)
    wanted_THD = run(whole, [Tokens(0, 11, (2, 0, 1))], qkv_TXD)
    rows = [run(in_chunks, [Tokens(a, b - a, (2, 0, 1))], qkv_TXD[a:b]) for a, b in ((0, 5), (5, 6), (6, 11))]
    assert same(whole, in_chunks)
    torch.testing.assert_close(torch.cat(rows), wanted_THD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plain_cache_of_another_type(dtype: torch.dtype) -> None:
    qkv_TXD = torch.randn(11, HEADS + 2 * KV_HEADS, SIZE, generator=torch.Generator().manual_seed(2))
    cache = random_cache(dtype, 3, BLOCK_SIZE, KV_HEADS, SIZE)
    rounded_TXD = qkv_TXD.clone()
    rounded_TXD[:, HEADS:] = qkv_TXD[:, HEADS:].to(dtype).float()
    wide = LayerCache(cache.keys_NSKD.float(), cache.values_NSKD.float())
    for span in (Tokens(0, 9, (2, 0, 1)), Tokens(9, 1, (2, 0, 1)), Tokens(10, 1, (2, 0, 1))):
        rows = slice(span.start, span.start + span.count)
        torch.testing.assert_close(run(cache, [span], qkv_TXD[rows]), run(wide, [span], rounded_TXD[rows]))
