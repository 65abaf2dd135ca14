"""A layer's cache as the kernels take it. No torch before there is a cache, as compile_ahead.py goes without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidewright.devices.cuda.attention_launch import FP8_CODES, INT8_CODES, PLAIN

if TYPE_CHECKING:
    import torch

    from tidewright.kv_cache.storage import LayerCache


def codes_in(cache: LayerCache) -> int:
    from tidewright.kv_cache.quantized import FP8, INT8

    return {INT8: INT8_CODES, FP8: FP8_CODES}.get(cache.dtype, PLAIN)


def cache_arguments(cache: LayerCache) -> tuple[torch.Tensor, ...]:
    """Keys, values and their scales; without scales, what is never read stands for them. Codes are bytes."""
    keys, values = cache.keys_NSKD, cache.values_NSKD
    if cache.key_scales_NKS is None or cache.value_scales_NKS is None:
        return keys, values, keys, values
    from tidewright.kv_cache.quantized import INT8

    return keys.view(INT8), values.view(INT8), cache.key_scales_NKS, cache.value_scales_NKS


def cache_strides(cache: LayerCache) -> tuple[int, ...]:
    """Of blocks, slots and heads, and of the scales' blocks."""
    scales = cache.key_scales_NKS
    return (*cache.keys_NSKD.stride()[:3], 0 if scales is None else scales.stride(0))


def check_layout(cache: LayerCache) -> None:
    keys, values = cache.keys_NSKD, cache.values_NSKD
    assert keys.stride() == values.stride(), "one layout for keys and values"
    assert keys.stride(3) == 1, "a head's numbers are contiguous"
    scales = (cache.key_scales_NKS, cache.value_scales_NKS)
    assert [one is not None for one in scales] == [codes_in(cache) != PLAIN] * 2, "scales where there are codes"
    for one in scales:
        assert one is None or one.is_contiguous(), "scales are contiguous"
