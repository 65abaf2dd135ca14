"""Attention over the paged KV cache in the Triton language: decode, the combination of its splits, and chunked prefill.

Device code only; attention_launch.py chooses tiles and splits. One loop serves decode and prefill: a tile of M
rows, each a query head at a position, reads the context C of its sequence and KV head. Sums are float32. Scores are
kept in base 2, because exp2 is what the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidewright.devices.cuda.cache_codes import numbers_of, unit_of


@triton.jit
def _attend(
    q_MD,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    table,
    positions_M,
    first,
    end,
    stride_n,
    stride_s,
    stride_scales,
    scale,
    window,
    softcap,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CODES: tl.constexpr,
):
    """The context from `first` to `end` seen from each row: (weighted values, greatest score, sum of weights).

    A row that sees nothing has a sum of 0 and a greatest score of -inf. The caches begin at this KV head. A quantized
    cache stays as it is: the scale of a key goes to its score, that of a value to its weight.
    """
    # Weights times scales may be less than float16 holds.
    V_TYPE: tl.constexpr = tl.bfloat16 if CODES > 0 and q_MD.dtype == tl.float16 else q_MD.dtype
    M: tl.constexpr = q_MD.shape[0]
    LOG2_E: tl.constexpr = 1.4426950408889634
    dims_D = tl.arange(0, D)
    greatest_M = tl.full([M], float("-inf"), tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    values_MD = tl.zeros([M, D], tl.float32)
    for start in range(first, end, TILE):
        places_C = start + tl.arange(0, TILE)
        exists_C = places_C < end
        blocks_C = tl.load(table + places_C // BLOCK_SIZE, mask=exists_C, other=0).to(tl.int64)
        slots_C = blocks_C * stride_n + (places_C % BLOCK_SIZE) * stride_s
        mask_CD = exists_C[:, None] & (dims_D < HEAD_DIM)[None, :]
        k_CD = tl.load(k_cache + slots_C[:, None] + dims_D[None, :], mask=mask_CD, other=0)
        k_CD = numbers_of(k_CD, CODES, q_MD.dtype)
        scores_MC = tl.dot(q_MD, tl.trans(k_CD), input_precision="ieee") * scale
        if CODES > 0:
            scales_C = blocks_C * stride_scales + places_C % BLOCK_SIZE
            k_scales_C = tl.load(k_scales + scales_C, mask=exists_C, other=0.0) * unit_of(CODES)
            scores_MC = scores_MC * k_scales_C[None, :]
        if HAS_SOFTCAP:  # softcap * tanh(score / softcap), in the form that overflows nowhere
            scores_MC = softcap - 2.0 * softcap / (1.0 + tl.exp2(scores_MC * (2.0 * LOG2_E / softcap)))
        sees_MC = exists_C[None, :] & (places_C[None, :] <= positions_M[:, None])
        if HAS_WINDOW:
            sees_MC = sees_MC & (places_C[None, :] > positions_M[:, None] - window)
        scores_MC = tl.where(sees_MC, scores_MC * LOG2_E, float("-inf"))
        new_M = tl.maximum(greatest_M, tl.max(scores_MC, 1))
        # -inf - (-inf) is NaN: a row that has seen nothing yet subtracts 0.
        base_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        weights_MC = tl.exp2(scores_MC - base_M[:, None])
        shrink_M = tl.exp2(greatest_M - base_M)
        sum_M = sum_M * shrink_M + tl.sum(weights_MC, 1)
        v_CD = tl.load(v_cache + slots_C[:, None] + dims_D[None, :], mask=mask_CD, other=0)
        v_CD = numbers_of(v_CD, CODES, V_TYPE)
        if CODES > 0:
            v_scales_C = tl.load(v_scales + scales_C, mask=exists_C, other=0.0) * unit_of(CODES)
            weights_MC = weights_MC * v_scales_C[None, :]
        values_MD = values_MD * shrink_M[:, None]
        values_MD = tl.dot(weights_MC.to(V_TYPE), v_CD, values_MD, input_precision="ieee")
        greatest_M = new_M
    return values_MD, greatest_M, sum_M


@triton.jit(do_not_specialize=["window"])
def decode_kernel(
    out_BHD,
    split_values,
    split_sums,
    q_BHD,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    tables_PM,
    spans_B4,
    lengths_B,
    stride_out,
    stride_q,
    stride_n,
    stride_s,
    stride_k,
    stride_scales,
    scale,
    window,
    softcap,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CODES: tl.constexpr,
):
    """One program a (sequence, KV head, split): the KV head's GROUP query heads, over one split of the context.

    The split points depend on the sequence's own length alone, so its result is bit-equal in any batch. A length of 0
    (padding) gives zeros. With one split the result goes to `out`; otherwise `combine_kernel` computes it, and does not
    read the values of empty splits.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths_B + sequence)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(length - window, 0)
    used = tl.maximum(tl.minimum(tl.cdiv(length - begin, MIN_SPLIT), SPLITS), 1)
    size = tl.cdiv(tl.cdiv(length - begin, used), TILE) * TILE
    first = begin + split * size
    end = tl.minimum(first + size, length)

    rows_M = tl.arange(0, M)
    heads_M = kv_head * GROUP + rows_M
    at_M = (sequence * (tl.num_programs(1) * GROUP) + heads_M) * SPLITS + split
    if SPLITS > 1:  # noqa: SIM102 - compiled in or not
        if first >= end:  # a grid has as many splits as the longest context that there may be
            tl.store(split_sums + at_M, tl.full([M], float("-inf"), tl.float32), mask=rows_M < GROUP)
            return
    dims_D = tl.arange(0, D)
    mask_MD = (rows_M < GROUP)[:, None] & (dims_D < HEAD_DIM)[None, :]
    at_MD = heads_M[:, None] * HEAD_DIM + dims_D[None, :]
    q_MD = tl.load(q_BHD + sequence * stride_q + at_MD, mask=mask_MD, other=0.0)
    positions_M = tl.zeros([M], tl.int32) + (length - 1)
    values_MD, greatest_M, sum_M = _attend(
        q_MD,
        k_cache + kv_head * stride_k,
        v_cache + kv_head * stride_k,
        k_scales + kv_head * BLOCK_SIZE,
        v_scales + kv_head * BLOCK_SIZE,
        tables_PM + tl.load(spans_B4 + sequence * 4 + 3),
        positions_M,
        first,
        end,
        stride_n,
        stride_s,
        stride_scales,
        scale,
        window,
        softcap,
        HEAD_DIM,
        D,
        BLOCK_SIZE,
        TILE,
        HAS_WINDOW,
        HAS_SOFTCAP,
        CODES,
    )
    divisor_M = tl.where(sum_M > 0.0, sum_M, 1.0)
    values_MD = values_MD / divisor_M[:, None]
    if SPLITS == 1:
        tl.store(out_BHD + sequence * stride_out + at_MD, values_MD.to(out_BHD.dtype.element_ty), mask=mask_MD)
    else:
        sums_M = tl.where(sum_M > 0.0, greatest_M + tl.log2(divisor_M), float("-inf"))
        tl.store(split_sums + at_M, sums_M, mask=rows_M < GROUP)
        tl.store(split_values + at_M[:, None] * HEAD_DIM + dims_D[None, :], values_MD, mask=mask_MD)


@triton.jit
def combine_kernel(
    out_BHD,
    split_values,
    split_sums,
    stride_out,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program a (sequence, query head): the splits' results, each weighted by the sum of its weights (log2)."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    splits_P = tl.arange(0, SPLITS)
    dims_D = tl.arange(0, D)
    at_P = (sequence * tl.num_programs(1) + head) * SPLITS + splits_P
    sums_P = tl.load(split_sums + at_P)
    greatest = tl.max(sums_P, 0)
    base = tl.where(greatest == float("-inf"), 0.0, greatest)
    weights_P = tl.exp2(sums_P - base)
    mask_PD = (weights_P > 0.0)[:, None] & (dims_D < HEAD_DIM)[None, :]
    values_PD = tl.load(split_values + at_P[:, None] * HEAD_DIM + dims_D[None, :], mask=mask_PD, other=0.0)
    total = tl.sum(weights_P, 0)
    values_D = tl.sum(values_PD * weights_P[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    at_D = sequence * stride_out + head * HEAD_DIM + dims_D
    tl.store(out_BHD + at_D, values_D.to(out_BHD.dtype.element_ty), mask=dims_D < HEAD_DIM)


@triton.jit(do_not_specialize=["num_sequences", "window"])
def prefill_kernel(
    out_THD,
    q_THD,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    tables_PM,
    spans_B4,
    num_sequences,
    stride_out,
    stride_q,
    stride_n,
    stride_s,
    stride_k,
    stride_scales,
    scale,
    window,
    softcap,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    CODES: tl.constexpr,
):
    """One program a (tile of new tokens, KV head); the rows are M // GROUP tokens times their GROUP query heads.

    The tiles of sequence b begin at tile floor(start of b / tokens) + b, which leaves room for every ragged last tile.
    So the grid depends only on the numbers of tokens and sequences, and a program finds its sequence by bisection.
    """
    TOKENS: tl.constexpr = M // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    origin = tl.load(spans_B4)
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if (tl.load(spans_B4 + middle * 4) - origin) // TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    sequence = low - 1
    span = spans_B4 + sequence * 4
    start = tl.load(span)
    context = tl.load(span + 1)
    count = tl.load(span + 2)
    offset = (tile - (start - origin) // TOKENS - sequence) * TOKENS
    if offset >= count:
        return
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(context + offset + 1 - window, 0)
    end = context + tl.minimum(offset + TOKENS, count)

    rows_M = tl.arange(0, M)
    dims_D = tl.arange(0, D)
    tokens_M = offset + rows_M // GROUP
    heads_M = kv_head * GROUP + rows_M % GROUP
    exists_M = (rows_M < TOKENS * GROUP) & (tokens_M < count)
    mask_MD = exists_M[:, None] & (dims_D < HEAD_DIM)[None, :]
    row_M = (start + tokens_M).to(tl.int64)
    at_MD = heads_M[:, None] * HEAD_DIM + dims_D[None, :]
    q_MD = tl.load(q_THD + row_M[:, None] * stride_q + at_MD, mask=mask_MD, other=0.0)
    values_MD, _, sum_M = _attend(
        q_MD,
        k_cache + kv_head * stride_k,
        v_cache + kv_head * stride_k,
        k_scales + kv_head * BLOCK_SIZE,
        v_scales + kv_head * BLOCK_SIZE,
        tables_PM + tl.load(span + 3),
        context + tokens_M,
        begin,
        end,
        stride_n,
        stride_s,
        stride_scales,
        scale,
        window,
        softcap,
        HEAD_DIM,
        D,
        BLOCK_SIZE,
        TILE,
        HAS_WINDOW,
        HAS_SOFTCAP,
        CODES,
    )
    values_MD = values_MD / tl.where(sum_M > 0.0, sum_M, 1.0)[:, None]
    tl.store(out_THD + row_M[:, None] * stride_out + at_MD, values_MD.to(out_THD.dtype.element_ty), mask=mask_MD)
