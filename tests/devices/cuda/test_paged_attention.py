"""devices/cuda/paged_attention.py, interpreted on the CPU, against numpy in float64 and the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.interpreted import interpreted
from helpers.paged import UNUSED, Model, Step, make_step
from tidewright.attention.base import AttentionLayer
from tidewright.kv_cache.storage import LayerCache

with interpreted():
    from tidewright.devices.cuda.paged_attention import PagedStep, paged_attention

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLOSE = {FP32: 3e-6, FP16: 1e-3, BF16: 6e-3}


def padded(paged: PagedStep, count: int, **bounds: int) -> PagedStep:
    """With `count` sequences of length 0 after the others, as in a bucket for a graph, and with the bucket's bounds."""
    spans_B4 = torch.cat((paged.spans_B4, torch.tensor([[UNUSED, 0, 0, UNUSED]] * count, dtype=torch.int32)))
    lengths_B = torch.cat((paged.lengths_B, torch.zeros(count, dtype=torch.int32)))
    return replace(paged, spans_B4=spans_B4, lengths_B=lengths_B, **bounds)


def run(step: Step, layer: AttentionLayer, paged: PagedStep | None = None) -> torch.Tensor:
    cache = LayerCache(step.k_cache_NSKD, step.v_cache_NSKD)
    return paged_attention(step.q_THD, cache, paged or PagedStep.of(step.batch()), layer)


def check(
    model: Model,
    lengths: Sequence[tuple[int, int]],
    window: int | None = None,
    softcap: float | None = None,
    seed: int = 0,
) -> None:
    layer = AttentionLayer(1 / math.sqrt(model.head_dim), window, softcap)
    step = make_step(model, lengths, seed)
    out_THD = run(step, layer)
    assert out_THD.dtype == model.dtype
    close = CLOSE[model.dtype]
    torch.testing.assert_close(out_THD.double(), step.exact(layer), atol=close, rtol=close)
    torch.testing.assert_close(out_THD, step.by_reference(layer), atol=2 * close, rtol=2 * close)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(2, 2, 64, 16), (3, 1, 80, 32), (8, 2, 96, 16), (8, 1, 128, 32)]
)
def test_a_mixed_step(heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    model = Model(heads, kv_heads, head_dim, block_size, dtype)
    check(model, [(0, 1), (31, 1), (32, 1), (299, 1), (0, 5), (16, 16), (40, 37)])


def test_large_heads_with_everything() -> None:
    check(Model(4, 1, 256, 16, BF16), [(20, 1), (300, 1), (7, 30)], window=24, softcap=3.0)


@pytest.mark.parametrize(
    ("window", "softcap"), [(None, 2.0), (1, None), (2, 2.0), (16, None), (17, 2.0), (100, None), (1000, 2.0)]
)
def test_windows_and_softcaps(window: int | None, softcap: float | None) -> None:
    """Decode and prefill, with windows that begin inside a block, at its edge, and before the context."""
    check(Model(6, 2), [(0, 1), (15, 1), (16, 1), (400, 1), (0, 40), (90, 20)], window, softcap)


def test_scores_far_outside_of_what_an_exponent_holds() -> None:
    step = make_step(Model(2, 1), [(40, 1), (0, 20)])
    for softcap in (None, 50.0):
        layer = AttentionLayer(scale=40.0, softcap=softcap)
        torch.testing.assert_close(run(step, layer).double(), step.exact(layer), atol=1e-3, rtol=1e-3)


def test_a_long_prompt_in_chunks() -> None:
    model = Model(3, 1, 64, 16, FP16)
    for chunk in [(0, 599), (437, 163), (597, 3)]:
        check(model, [chunk])


def test_the_bits_of_a_decode_depend_on_its_own_sequence_alone() -> None:
    """Not on the batch, its padding or the bound on contexts, which decide the number of programs."""
    layer = AttentionLayer(0.125)
    step = make_step(Model(4, 2), [(9, 1), (255, 1), (256, 1), (599, 1)])
    bucket = replace(step, qkv_TXD=torch.cat((step.qkv_TXD, step.qkv_TXD[:3])))
    paged = padded(PagedStep.of(step.batch()), 3, num_decodes=7, max_context=1100)
    together = run(bucket, layer, paged)
    for i, span in enumerate(step.spans):
        alone = replace(step, spans=(span,), qkv_TXD=step.qkv_TXD[i : i + 1])
        assert torch.equal(run(alone, layer), together[i : i + 1])


@pytest.mark.parametrize("max_context", [64, 600])
def test_padding_gives_zeros_in_a_bucket_for_a_graph(max_context: int) -> None:
    """Whatever an earlier step left in the padding's rows."""
    step = make_step(Model(4, 2), [(9, 1), (20, 1)])
    bucket = replace(step, qkv_TXD=torch.cat((step.qkv_TXD, torch.full_like(step.qkv_TXD, torch.nan))))
    layer = AttentionLayer(0.125, window=12)
    out_THD = run(bucket, layer, padded(PagedStep.of(step.batch()), 2, num_decodes=4, max_context=max_context))
    torch.testing.assert_close(out_THD[:2], run(step, layer))
    assert torch.equal(out_THD[2:], torch.zeros_like(out_THD[2:]))


def test_blocks_before_the_window_may_be_gone() -> None:
    layer = AttentionLayer(0.125, window=20)
    step = make_step(Model(4, 2), [(99, 1), (90, 10)])
    paged = PagedStep.of(step.batch())
    tables = paged.tables_PM.flatten()
    for _, start, _, at in paged.spans_B4.tolist():
        tables[at : at + (start - 19) // 16] = UNUSED
    torch.testing.assert_close(run(step, layer, paged).double(), step.exact(layer), atol=3e-6, rtol=3e-6)


@settings(max_examples=8, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.sampled_from([1, 1, 2, 7, 33])), min_size=1, max_size=5),
    st.sampled_from([(2, 2), (3, 1), (4, 1), (16, 2), (20, 1)]),
    st.sampled_from([16, 32]),
    st.none() | st.integers(1, 320),
    st.none() | st.floats(0.5, 50),
    st.integers(0, 1000),
)
def test_any_step(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    window: int | None,
    softcap: float | None,
    seed: int,
) -> None:
    check(Model(*heads, head_dim=64, block_size=block_size), lengths, window, softcap, seed)
