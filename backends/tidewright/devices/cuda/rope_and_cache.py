"""Rotary position embedding of q and k, and the write of keys and values into the paged cache, in one kernel."""


# mypy: allow-untyped-defs

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from tidewright.devices.cuda.attention_launch import PLAIN
from tidewright.devices.cuda.cache_arguments import cache_arguments, cache_strides, check_layout, codes_in
from tidewright.devices.cuda.cache_codes import codes_of, largest_bits, scales_of
from tidewright.devices.cuda.launch import Launch, power_of_two, start

if TYPE_CHECKING:
    import torch

    from tidewright.kv_cache.storage import LayerCache

_PAIRS = 512  # per program: few, so that even a single token occupies several processors


def launch_of(heads: int, head_dim: int, block_size: int, codes: int = PLAIN) -> Launch:
    """`heads`: those of q, k and v together. `codes`: what the cache holds."""
    half = power_of_two(head_dim // 2)
    tile = min(power_of_two(heads), max(1, _PAIRS // half))
    constants = {"HALF": head_dim // 2, "D": half, "BLOCK_SIZE": block_size, "HEADS": tile, "CODES": codes}
    return Launch(constants, warps=4 if tile * half > 256 else 2, stages=1)


def rotate_and_store(
    qkv_TXD: torch.Tensor,
    cos_PD: torch.Tensor,
    sin_PD: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    cache: LayerCache,
    q_THD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the rotated queries q_THD; writes rotated keys and plain values to slots_T (block * S + offset).

    X: all heads of q, k and v, side by side. The tables are those of attention.base.Rotation, in float32. A row with
    slot -1 is padding: it writes nothing to the cache, but its position must be inside the tables. The cache may have
    another dtype than q, k and v; a quantized one gets codes and scales.
    """
    tokens, all_heads, head_dim = qkv_TXD.shape
    _, block_size, kv_heads, _ = cache.keys_NSKD.shape
    heads = all_heads - 2 * kv_heads
    assert qkv_TXD.stride()[1:] == (head_dim, 1), "a row's heads lie side by side"
    check_layout(cache)
    assert cos_PD.stride(1) == sin_PD.stride(1) == 1
    assert cos_PD.stride(0) == sin_PD.stride(0) == head_dim
    if q_THD is None:
        q_THD = qkv_TXD.new_empty((tokens, heads, head_dim))
    launch = launch_of(all_heads, head_dim, block_size, codes_in(cache))
    if tokens:
        start(
            rotate_kernel,
            (tokens, -(-all_heads // launch.constants["HEADS"])),
            launch,
            qkv_TXD,
            cos_PD,
            sin_PD,
            positions_T,
            slots_T,
            q_THD,
            *cache_arguments(cache),
            heads,
            kv_heads,
            qkv_TXD.stride(0),
            q_THD.stride(0),
            *cache_strides(cache),
        )
    return q_THD


@triton.jit
def rotate_kernel(
    qkv_TXD,
    cos_PD,
    sin_PD,
    positions_T,
    slots_T,
    q_THD,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    heads,
    kv_heads,
    stride_qkv,
    stride_q,
    stride_n,
    stride_s,
    stride_k,
    stride_scales,
    HALF: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    CODES: tl.constexpr,
):
    """Rotates HEADS heads of one token: pairs of a dimension in a head's first half and the same one in its second."""
    token = tl.program_id(0).to(tl.int64)
    heads_X = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims_D = tl.arange(0, D)
    is_there_XD = (heads_X < heads + 2 * kv_heads)[:, None] & (dims_D < HALF)[None, :]

    source_XD = qkv_TXD + token * stride_qkv + heads_X[:, None] * (2 * HALF) + dims_D[None, :]
    first_XD = tl.load(source_XD, mask=is_there_XD, other=0.0).to(tl.float32)
    second_XD = tl.load(source_XD + HALF, mask=is_there_XD, other=0.0).to(tl.float32)
    # Both halves of a table's row are equal up to the sign of the sine, which is plain in the second half.
    row = tl.load(positions_T + token).to(tl.int64) * (2 * HALF) + HALF
    cos_D = tl.load(cos_PD + row + dims_D, mask=dims_D < HALF, other=1.0)
    sin_D = tl.load(sin_PD + row + dims_D, mask=dims_D < HALF, other=0.0)
    turned_first_XD = first_XD * cos_D[None, :] - second_XD * sin_D[None, :]
    turned_second_XD = second_XD * cos_D[None, :] + first_XD * sin_D[None, :]

    is_q_XD = is_there_XD & (heads_X < heads)[:, None]
    q_XD = q_THD + token * stride_q + heads_X[:, None] * (2 * HALF) + dims_D[None, :]
    tl.store(q_XD, turned_first_XD.to(q_THD.dtype.element_ty), mask=is_q_XD)
    tl.store(q_XD + HALF, turned_second_XD.to(q_THD.dtype.element_ty), mask=is_q_XD)

    slot = tl.load(slots_T + token).to(tl.int64)
    if slot >= 0:
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        place = block * stride_n + offset * stride_s
        k_head_X = heads_X - heads
        v_head_X = k_head_X - kv_heads
        is_k_X = (k_head_X >= 0) & (k_head_X < kv_heads)
        is_v_X = (v_head_X >= 0) & (v_head_X < kv_heads)
        is_k_XD = is_there_XD & is_k_X[:, None]
        is_v_XD = is_there_XD & is_v_X[:, None]
        k_XD = k_cache + place + k_head_X[:, None] * stride_k + dims_D[None, :]
        v_XD = v_cache + place + v_head_X[:, None] * stride_k + dims_D[None, :]
        # Values are not rotated.
        stored_first_XD = tl.where(is_v_X[:, None], first_XD, turned_first_XD)
        stored_second_XD = tl.where(is_v_X[:, None], second_XD, turned_second_XD)
        if CODES > 0:
            bits_X = tl.maximum(largest_bits(stored_first_XD), largest_bits(stored_second_XD))
            factors_X, scales_X = scales_of(bits_X, CODES)
            cached_first_XD = codes_of(stored_first_XD, factors_X, CODES)
            cached_second_XD = codes_of(stored_second_XD, factors_X, CODES)
            scale = block * stride_scales + offset
            tl.store(k_scales + scale + k_head_X * BLOCK_SIZE, scales_X, mask=is_k_X)
            tl.store(v_scales + scale + v_head_X * BLOCK_SIZE, scales_X, mask=is_v_X)
        else:
            cached_first_XD = stored_first_XD.to(k_cache.dtype.element_ty)
            cached_second_XD = stored_second_XD.to(k_cache.dtype.element_ty)
        tl.store(k_XD, cached_first_XD, mask=is_k_XD)
        tl.store(k_XD + HALF, cached_second_XD, mask=is_k_XD)
        tl.store(v_XD, cached_first_XD, mask=is_v_XD)
        tl.store(v_XD + HALF, cached_second_XD, mask=is_v_XD)
