"""Sampling in the Triton language: penalties, temperature, truncation without a sort, and the draw.

sampling.py launches the kernels in this order and explains them.
"""


# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from tidewright.devices.cuda.lot_kernels import lots_of, words_at, words_of
from tidewright.sampling.truncation import BLOCK
from tidewright.step.sampling import GREEDY_BELOW

IN_PROMPT = 2**30
"""The bit of a token's count that says that the prompt has it; the bits below count the output."""

_BLOCK = tl.constexpr(BLOCK)
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_IN_PROMPT = tl.constexpr(IN_PROMPT)
_LOWEST_KEY = tl.constexpr(-(2**31))
_NAN_KEY = tl.constexpr(2**31 - 1)
_ONE = tl.constexpr(0x3F800000)  # 1.0 by its bits


@triton.jit
def _key_of(x):
    """An int32 with the order of x; NaN is above all, and -0 equals 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, _NAN_KEY, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _value_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best_of_chunks(keys_BC, row, chunks, CHUNKS: tl.constexpr):
    """The highest key of a row, and the first chunk that has it."""
    places_C = tl.arange(0, CHUNKS)
    keys_C = tl.load(keys_BC + row * chunks + places_C, mask=places_C < chunks, other=_LOWEST_KEY)
    return tl.max(keys_C, 0, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def penalise_kernel(
    logits_BV,
    work_BV,
    keys_BC,
    firsts_BC,
    repetition_B,
    frequency_B,
    presence_B,
    count_rows_B,
    counts_NV,
    vocab,
    stride_logits,
    chunks,
    HAS_PENALTIES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    tokens_X = chunk * CHUNK + tl.arange(0, CHUNK)
    mask_X = tokens_X < vocab
    x_X = tl.load(logits_BV + row * stride_logits + tokens_X, mask=mask_X, other=0.0).to(tl.float32)
    if HAS_PENALTIES:
        count_row = tl.load(count_rows_B + row).to(tl.int64)
        if count_row >= 0:
            counts_X = tl.load(counts_NV + count_row * vocab + tokens_X, mask=mask_X, other=0)
            repetition = tl.load(repetition_B + row)
            times_X = counts_X & (_IN_PROMPT - 1)
            # float64, as on the CPU: the same to the bit.
            wide_X = x_X.to(tl.float64)
            wide_X = tl.where(wide_X > 0, wide_X / repetition, wide_X * repetition)
            wide_X = wide_X - tl.load(frequency_B + row) * times_X.to(tl.float64)
            wide_X = wide_X - tl.load(presence_B + row) * (times_X > 0).to(tl.float64)
            x_X = tl.where(counts_X != 0, wide_X.to(tl.float32), x_X)
    tl.store(work_BV + row * vocab + tokens_X, x_X, mask=mask_X)
    keys_X = tl.where(mask_X, _key_of(x_X), _LOWEST_KEY)
    key, first = tl.max(keys_X, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(keys_BC + row * chunks + chunk, key)
    tl.store(firsts_BC + row * chunks + chunk, chunk * CHUNK + first)


@triton.jit
def weigh_kernel(work_BV, sums_BC, keys_BC, temperature_B, vocab, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_B + row)
    if temperature >= _GREEDY_BELOW:
        key, _chunk = _best_of_chunks(keys_BC, row, chunks, CHUNKS)
        tokens_X = chunk * CHUNK + tl.arange(0, CHUNK)
        mask_X = tokens_X < vocab
        x_X = tl.load(work_BV + row * vocab + tokens_X, mask=mask_X, other=float("-inf"))
        # The maximum goes first: a small temperature must not overflow.
        weights_X = tl.exp(tl.div_rn(x_X - _value_of(key), temperature + tl.zeros([CHUNK], tl.float32)))
        weights_X = tl.where(mask_X, weights_X, 0.0)
        tl.store(work_BV + row * vocab + tokens_X, weights_X, mask=mask_X)
        tl.store(sums_BC + row * chunks + chunk, tl.sum(weights_X, 0))


@triton.jit
def _lowest_with_less_above(weights, vocab, low, target, COUNTS: tl.constexpr, TILE: tl.constexpr):
    """The lowest float32 x >= `low` such that the weights above x sum up to less than `target`; 1 at most.

    With COUNTS, such that fewer weights than `target` are above x. Positive floats have the order of their bits, so
    this searches the bits, in four parts per pass; the answer is in (below, above]. Rounding does not break the order:
    in the same tree of additions, a sum of fewer weights is never greater.
    """
    below = low.to(tl.int32, bitcast=True) - 1
    above = below * 0 + _ONE
    while above - below > 1:
        gap = (above - below).to(tl.int64)
        first = below + ((gap + 3) // 4).to(tl.int32)
        second = below + ((gap * 2 + 3) // 4).to(tl.int32)
        third = below + ((gap * 3 + 3) // 4).to(tl.int32)
        # One sum per lane, and a reduction over the lanes only after the last tile.
        above_first_X = tl.zeros([TILE], tl.float32)
        above_second_X = tl.zeros([TILE], tl.float32)
        above_third_X = tl.zeros([TILE], tl.float32)
        for start in range(0, vocab, TILE):
            tokens_X = start + tl.arange(0, TILE)
            weights_X = tl.load(weights + tokens_X, mask=tokens_X < vocab, other=0.0)
            bits_X = weights_X.to(tl.int32, bitcast=True)
            if COUNTS:
                weights_X = tl.full([TILE], 1.0, tl.float32)
            above_first_X += tl.where(bits_X > first, weights_X, 0.0)
            above_second_X += tl.where(bits_X > second, weights_X, 0.0)
            above_third_X += tl.where(bits_X > third, weights_X, 0.0)
        if tl.sum(above_first_X, 0).to(tl.float64) < target:
            above = first
        elif tl.sum(above_second_X, 0).to(tl.float64) < target:
            below = first
            above = second
        elif tl.sum(above_third_X, 0).to(tl.float64) < target:
            below = second
            above = third
        else:
            below = third
    return above.to(tl.float32, bitcast=True)


@triton.jit
def truncate_kernel(
    work_BV,
    sums_BC,
    edges_B,
    temperature_B,
    top_k_B,
    top_p_B,
    min_p_B,
    vocab,
    chunks,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The lowest weight that stays, by one program per row."""
    row = tl.program_id(0).to(tl.int64)
    edge = tl.load(min_p_B + row)  # relative to the highest weight, which is 1
    places_C = tl.arange(0, CHUNKS)
    total = tl.sum(tl.load(sums_BC + row * chunks + places_C, mask=places_C < chunks, other=0.0), 0).to(tl.float64)
    is_random = tl.load(temperature_B + row) >= _GREEDY_BELOW
    if is_random & (total > 0) & (total < float("inf")):
        weights = work_BV + row * vocab
        top_k = tl.load(top_k_B + row)
        top_p = tl.load(top_p_B + row)
        if top_k > 0:
            edge = _lowest_with_less_above(weights, vocab, edge, top_k.to(tl.float64), True, TILE)
        if top_p < 1:
            if edge > 0:
                kept_X = tl.zeros([TILE], tl.float32)
                for start in range(0, vocab, TILE):
                    tokens_X = start + tl.arange(0, TILE)
                    weights_X = tl.load(weights + tokens_X, mask=tokens_X < vocab, other=0.0)
                    kept_X += tl.where(weights_X >= edge, weights_X, 0.0)
                total = tl.sum(kept_X, 0).to(tl.float64)
            edge = _lowest_with_less_above(weights, vocab, edge, top_p * total, False, TILE)
    tl.store(edges_B + row, edge)


@triton.jit
def race_kernel(
    work_BV,
    edges_B,
    scores_BC,
    blocks_BC,
    masses_BC,
    temperature_B,
    seeds_B,
    positions_B,
    vocab,
    chunks,
    HAS_EDGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For each chunk the block that wins, by mass and lot, and the mass of the chunk."""
    BLOCKS: tl.constexpr = CHUNK // _BLOCK
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if tl.load(temperature_B + row) >= _GREEDY_BELOW:
        blocks_N = chunk * BLOCKS + tl.arange(0, BLOCKS)
        tokens_NS = blocks_N[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        weights_NS = tl.load(work_BV + row * vocab + tokens_NS, mask=tokens_NS < vocab, other=0.0)
        if HAS_EDGES:
            weights_NS = tl.where(weights_NS >= tl.load(edges_B + row), weights_NS, 0.0)
        masses_N = tl.sum(weights_NS, 1)
        words_N = words_of(tl.load(seeds_B + row), tl.load(positions_B + row), chunk * (BLOCKS // 4), BLOCKS // 4)
        scores_N = tl.div_rn(masses_N, lots_of(words_N))
        score, first = tl.max(scores_N, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(scores_BC + row * chunks + chunk, score)
        tl.store(blocks_BC + row * chunks + chunk, chunk * BLOCKS + first)
        tl.store(masses_BC + row * chunks + chunk, tl.sum(masses_N, 0))


@triton.jit
def pick_kernel(
    work_BV,
    edges_B,
    keys_BC,
    firsts_BC,
    scores_BC,
    blocks_BC,
    masses_BC,
    tokens_B,
    temperature_B,
    seeds_B,
    positions_B,
    vocab,
    chunks,
    HAS_RANDOM: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The token that wins inside the block that won; for greedy rows the first of the highest logits."""
    row = tl.program_id(0).to(tl.int64)
    _key, best_chunk = _best_of_chunks(keys_BC, row, chunks, CHUNKS)
    token = tl.load(firsts_BC + row * chunks + best_chunk)
    if HAS_RANDOM:  # noqa: SIM102 - compiled in or not
        if tl.load(temperature_B + row) >= _GREEDY_BELOW:
            places_C = tl.arange(0, CHUNKS)
            is_chunk_C = places_C < chunks
            mass = tl.sum(tl.load(masses_BC + row * chunks + places_C, mask=is_chunk_C, other=0.0), 0)
            # Otherwise (NaN, infinity, all banned) it is not a distribution, and the highest logit is taken.
            if (mass > 0) & (mass < float("inf")):
                scores_C = tl.load(scores_BC + row * chunks + places_C, mask=is_chunk_C, other=-1.0)
                chunk = tl.argmax(scores_C, 0, tie_break_left=True)
                block = tl.load(blocks_BC + row * chunks + chunk)
                places_S = tl.arange(0, _BLOCK)
                tokens_S = block * _BLOCK + places_S
                weights_S = tl.load(work_BV + row * vocab + tokens_S, mask=tokens_S < vocab, other=0.0)
                if HAS_EDGES:
                    weights_S = tl.where(weights_S >= tl.load(edges_B + row), weights_S, 0.0)
                lots_from = (vocab + _BLOCK - 1) // _BLOCK  # after those of the blocks
                words_S = words_at(tl.load(seeds_B + row), tl.load(positions_B + row), lots_from + places_S)
                scores_S = tl.div_rn(weights_S, lots_of(words_S))
                inside = tl.argmax(scores_S, 0, tie_break_left=True)
                token = block * _BLOCK + inside
    tl.store(tokens_B + row, token.to(tl.int64))


@triton.jit
def count_kernel(counts_NV, count_rows_B, tokens_B, vocab):
    row = tl.program_id(0)
    count_row = tl.load(count_rows_B + row).to(tl.int64)
    if count_row >= 0:
        tl.atomic_add(counts_NV + count_row * vocab + tl.load(tokens_B + row), 1)
