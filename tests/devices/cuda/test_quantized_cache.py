"""The kernels for GPUs on a quantized cache, interpreted: codes and scales to the bit, attention in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.coded_cache import copied, plain, random_cache, same
from helpers.interpreted import interpreted
from helpers.paged import Model, Step, make_step
from helpers.rotation import no_rotation
from helpers.vectors import vectors
from tidewright.attention.base import AttentionLayer
from tidewright.kv_cache.quantized import FP8, INT8, quantize
from tidewright.kv_cache.storage import LayerCache

with interpreted():
    from tidewright.devices.cuda.paged_attention import PagedStep, paged_attention
    from tidewright.devices.cuda.rope_and_cache import rotate_and_store

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLOSE = {FP32: 3e-6, FP16: 6e-3, BF16: 6e-3}  # beside float16, weights with their scales are bfloat16
FORMATS = pytest.mark.parametrize("cache_dtype", [INT8, FP8])


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # the rotation of an infinity
@FORMATS
@pytest.mark.parametrize(("size", "dtype", "block_size"), [(64, FP32, 16), (80, BF16, 4), (96, BF16, 16)])
def test_codes_and_scales_are_those_of_the_definition(
    size: int, dtype: torch.dtype, block_size: int, cache_dtype: torch.dtype
) -> None:
    tokens, kv_heads = 20, 2
    ours = random_cache(cache_dtype, 48 // block_size, block_size, kv_heads, size)
    wanted = copied(ours)
    k_TKD = vectors(tokens, kv_heads, size, dtype)
    v_TKD = k_TKD.flip(0)
    qkv_TXD = torch.cat((torch.ones_like(k_TKD), k_TKD, v_TKD), dim=1)
    slots_T = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:tokens]
    slots_T[4] = -1
    turn = no_rotation(qkv_TXD)
    rotate_and_store(qkv_TXD, turn.cos_PD, turn.sin_PD, turn.positions_T, slots_T, ours)
    scales = wanted.key_scales_NKS, wanted.value_scales_NKS
    for row, slot in enumerate(slots_T.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, block_size)
        for numbers, own, x_TKD in zip((wanted.keys_NSKD, wanted.values_NSKD), scales, (k_TKD, v_TKD), strict=True):
            codes_KD, scales_K = quantize(x_TKD[row], cache_dtype)
            numbers[block, offset] = codes_KD
            assert own is not None
            own[block, :, offset] = scales_K
    assert same(ours, wanted)


def coded(step: Step, cache_dtype: torch.dtype) -> tuple[Step, LayerCache]:
    """The step on the numbers that the codes stand for, as float64 reads them; what no token owns is NaN."""
    blocks, block_size, kv_heads, size = step.k_cache_NSKD.shape
    cache = random_cache(cache_dtype, blocks, block_size, kv_heads, size)
    numbers = plain(cache, torch.float32)
    owned = ~step.k_cache_NSKD.isnan().any(-1)
    for scales in (cache.key_scales_NKS, cache.value_scales_NKS):
        assert scales is not None
        scales.transpose(1, 2)[~owned] = torch.nan
    contexts = []
    for span, (k_CKD, _) in zip(step.spans, step.contexts, strict=True):
        table = torch.tensor(span.block_table)
        context = (x[table].flatten(0, 1)[: len(k_CKD)] for x in (numbers.keys_NSKD, numbers.values_NSKD))
        contexts.append(tuple(context))
    return replace(step, contexts=tuple(contexts)), cache  # type: ignore[arg-type]


@FORMATS
@pytest.mark.parametrize(
    ("model", "window", "softcap"),
    [
        (Model(9, 3, 64, 16, BF16), None, None),
        (Model(2, 1, 80, 32, FP32), 24, 3.0),
        (Model(4, 1, 128, 16, FP16), None, None),
    ],
)
def test_attention_of_a_mixed_step(
    model: Model, window: int | None, softcap: float | None, cache_dtype: torch.dtype
) -> None:
    layer = AttentionLayer(model.head_dim**-0.5, window, softcap)
    step, cache = coded(make_step(model, [(0, 1), (31, 1), (299, 1), (0, 5), (40, 37)]), cache_dtype)
    out_THD = paged_attention(step.q_THD, cache, PagedStep.of(step.batch()), layer)
    assert out_THD.dtype == model.dtype
    close = CLOSE[model.dtype]
    torch.testing.assert_close(out_THD.double(), step.exact(layer), atol=close, rtol=close)


def test_a_plain_cache_of_another_type() -> None:
    layer = AttentionLayer(0.125)
    step = make_step(Model(4, 2, 64, 16, BF16), [(31, 1), (299, 1), (0, 5), (40, 37)])
    cache = LayerCache(step.k_cache_NSKD, step.v_cache_NSKD)
    wide = replace(step, qkv_TXD=step.qkv_TXD.float())
    out_THD = paged_attention(wide.q_THD, cache, PagedStep.of(wide.batch()), layer)
    torch.testing.assert_close(out_THD.double(), wide.exact(layer), atol=3e-6, rtol=3e-6)


@FORMATS
def test_the_bits_of_a_decode_depend_on_its_own_sequence_alone(cache_dtype: torch.dtype) -> None:
    layer = AttentionLayer(0.125)
    step, cache = coded(make_step(Model(4, 2, 64, 16, BF16), [(9, 1), (255, 1), (599, 1)]), cache_dtype)
    together = paged_attention(step.q_THD, cache, PagedStep.of(step.batch()), layer)
    for i, span in enumerate(step.spans):
        alone = replace(step, spans=(span,), qkv_TXD=step.qkv_TXD[i : i + 1])
        out_THD = paged_attention(alone.q_THD, cache, PagedStep.of(alone.batch()), layer)
        assert torch.equal(out_THD, together[i : i + 1])
