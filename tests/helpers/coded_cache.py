"""Quantized caches with random contents, and the plain cache of the numbers that they hold."""

from __future__ import annotations

import torch

from tidewright.kv_cache.quantized import dequantize, is_quantized, quantize
from tidewright.kv_cache.storage import LayerCache


def random_cache(
    dtype: torch.dtype, blocks: int, block_size: int, kv_heads: int, size: int, seed: int = 0
) -> LayerCache:
    generator = torch.Generator().manual_seed(seed)
    numbers, scales = [], []
    for _ in range(2):
        x_TKD = torch.randn(blocks * block_size, kv_heads, size, generator=generator)
        shape = blocks, block_size, kv_heads, size
        if not is_quantized(dtype):
            numbers.append(x_TKD.to(dtype).view(shape))
            continue
        codes_TKD, scales_TK = quantize(x_TKD, dtype)
        numbers.append(codes_TKD.view(shape))
        scales.append(scales_TK.view(shape[:3]).transpose(1, 2).contiguous())
    return LayerCache(*numbers, *scales)


def copied(cache: LayerCache) -> LayerCache:
    return LayerCache(*(tensor.clone() for tensor in parts(cache)))


def parts(cache: LayerCache) -> tuple[torch.Tensor, ...]:
    """Keys, values and their scales."""
    assert cache.key_scales_NKS is not None
    assert cache.value_scales_NKS is not None
    return cache.keys_NSKD, cache.values_NSKD, cache.key_scales_NKS, cache.value_scales_NKS


def same(a: LayerCache, b: LayerCache) -> bool:
    """To the bit; NaN is NaN."""
    return all(
        torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8))
        for x, y in zip(parts(a), parts(b), strict=True)
    )


def plain(cache: LayerCache, dtype: torch.dtype) -> LayerCache:
    """The numbers themselves."""
    keys, values, key_scales, value_scales = parts(cache)
    return LayerCache(
        dequantize(keys, key_scales.transpose(1, 2), dtype), dequantize(values, value_scales.transpose(1, 2), dtype)
    )
