"""attention/reference.py against dense attention in float64, written as the formula says."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch

from helpers.rotation import no_rotation
from helpers.step_batches import Tokens, batch_of, in_order
from tidewright.attention.base import AttentionLayer
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.base import DeviceError
from tidewright.devices.registry import make_device
from tidewright.kv_cache.storage import LayerCache

KV_HEADS, HEAD_DIM, NUM_BLOCKS = 2, 8, 128
CPU = torch.device("cpu")
PLAIN = (AttentionLayer(scale=1 / math.sqrt(HEAD_DIM)),)


def dense(
    q_THD: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, start: int, layer: AttentionLayer
) -> torch.Tensor:
    """Each query alone: softmax over the keys up to its position, of those in the window."""
    out_THD = torch.empty_like(q_THD)
    group = q_THD.shape[1] // k_CKD.shape[1]
    for t, q_HD in enumerate(q_THD):
        end = start + t + 1
        first = 0 if layer.window is None else max(0, end - layer.window)
        for h, q_D in enumerate(q_HD):
            k_CD, v_CD = (x[first:end, h // group] for x in (k_CKD, v_CKD))
            scores_C = k_CD @ q_D * layer.scale
            if layer.softcap is not None:
                scores_C = layer.softcap * torch.tanh(scores_C / layer.softcap)
            out_THD[t, h] = scores_C.softmax(0) @ v_CD
    return out_THD


def check(
    lengths: list[tuple[int, int]], block_size: int, heads: int, seed: int = 0, layers: Sequence[AttentionLayer] = PLAIN
) -> None:
    """One step over sequences given as (start, count), in a cache whose other blocks hold rubbish."""
    torch.manual_seed(seed)
    free = list(range(NUM_BLOCKS))
    random.Random(seed).shuffle(free)
    spans = []
    for start, count in lengths:
        # One block more than needed: a table may be longer than the context.
        table = tuple(free.pop() for _ in range((start + count) // block_size + 1))
        spans.append(Tokens(start, count, table))
    spans = in_order(spans, block_size)
    shape = (NUM_BLOCKS, block_size, KV_HEADS, HEAD_DIM)
    k_cache_NSKD, v_cache_NSKD = (torch.full(shape, 1e4, dtype=torch.float64) for _ in range(2))
    queries, keys, values = [], [], []
    for span in spans:
        end = span.start + span.count
        k_CKD, v_CKD = (torch.randn(end, KV_HEADS, HEAD_DIM, dtype=torch.float64) for _ in range(2))
        for position in range(span.start):
            block, offset = span.block_table[position // block_size], position % block_size
            k_cache_NSKD[block, offset], v_cache_NSKD[block, offset] = k_CKD[position], v_CKD[position]
        queries.append(torch.randn(span.count, heads, HEAD_DIM, dtype=torch.float64))
        keys.append(k_CKD)
        values.append(v_CKD)
    k = [k_CKD[span.start :] for span, k_CKD in zip(spans, keys, strict=True)]
    v = [v_CKD[span.start :] for span, v_CKD in zip(spans, values, strict=True)]
    attention = ReferenceAttention(block_size, CPU)
    before = k_cache_NSKD.clone()
    batch, cache = batch_of(spans, block_size), LayerCache(k_cache_NSKD, v_cache_NSKD)
    attention.prepare(batch)
    qkv_TXD = torch.cat([torch.cat(part) for part in (queries, k, v)], dim=1)
    for layer in layers:  # all layers of a step share what was prepared
        out_THD = attention.forward(qkv_TXD, no_rotation(qkv_TXD), cache, batch, layer)
        expected = [
            dense(q_THD, k_CKD, v_CKD, span.start, layer)
            for span, q_THD, k_CKD, v_CKD in zip(spans, queries, keys, values, strict=True)
        ]
        torch.testing.assert_close(out_THD, torch.cat(expected))
    for span, new_k in zip(spans, k, strict=True):
        for t, position in enumerate(range(span.start, span.start + span.count)):
            place = (span.block_table[position // block_size], position % block_size)
            assert torch.equal(k_cache_NSKD[place], new_k[t])
            before[place] = new_k[t]
    assert torch.equal(k_cache_NSKD, before)  # and nothing else was written


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_mixed_step(block_size: int, heads: int) -> None:
    check([(0, 5), (3, 1), (7, 6), (15, 1), (0, 1), (16, 1), (4, 4)], block_size, heads)


@pytest.mark.parametrize("lengths", [[(0, 1)], [(0, 9)], [(8, 3)], [(40, 1)], [(i, 1) for i in range(10)]])
def test_uniform_steps(lengths: list[tuple[int, int]]) -> None:
    check(lengths, block_size=4, heads=4)


@pytest.mark.parametrize("seed", range(10))
def test_random_steps(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [(rng.randrange(20), rng.choice([1, 1, 1, 2, 7])) for _ in range(6)]
    check(lengths, rng.choice([2, 3, 8]), heads=4, seed=seed)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, 1000])
def test_windows_caps_and_scales_of_different_layers(window: int, softcap: float | None) -> None:
    layers = [
        AttentionLayer(scale=0.3, window=window, softcap=softcap),
        AttentionLayer(scale=0.7, softcap=softcap),
        AttentionLayer(scale=0.3, window=3),
    ]
    lengths = [(0, 5), (3, 1), (7, 6), (15, 1), (0, 1), (16, 1), (30, 1), (4, 20), (0, 25)]
    for heads in (2, 6):
        check(lengths, block_size=4, heads=heads, layers=layers)


def prepared(spans: Sequence[Tokens]) -> ReferenceAttention:
    attention = ReferenceAttention(4, CPU)
    attention.prepare(batch_of(spans, 4))
    return attention


def test_a_window_that_hides_nothing_costs_no_mask() -> None:
    prefill = prepared([Tokens(0, 9, (0, 1, 2))]).prefills[0]
    assert prefill.is_plain(AttentionLayer(scale=1, window=9))
    assert not prefill.is_plain(AttentionLayer(scale=1, window=8))
    decode = prepared([Tokens(7, 1, (0, 1))]).decodes[0]
    assert decode.mask(None) is decode.mask(8)
    assert decode.mask(None) is not decode.mask(7)
    assert decode.mask(7) is decode.mask(7)


def test_decodes_of_very_different_length_do_not_share_a_call() -> None:
    spans = [Tokens(start, 1, tuple(range(start // 4 + 1))) for start in (0, 2, 8, 20, 23, 200)]
    groups = prepared(spans).decodes
    assert [group.rows_B.tolist() for group in groups] == [[0, 1], [2], [3, 4], [5]]
    assert [tuple(group.blocks_BM.shape) for group in groups] == [(2, 1), (1, 3), (2, 6), (1, 51)]


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(DeviceError, match="attention 'fastest' does not exist; there is: auto, native, reference"):
        make_device("cpu", "fastest", 16, torch.float32, 64)
