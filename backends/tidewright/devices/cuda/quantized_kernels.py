"""Products with weights of 8 and 4 bits, and what belongs to them. Launched by quantized_weight.py.

A program multiplies a tile of outputs by a tile of tokens. It loads the codes as they are stored, `UNROLL` times `J`
bytes of each row at once, and makes numbers of them in registers. The tile is computed transposed, outputs by tokens:
so the weight is the operand that tensor cores may take from registers, and a few tokens do not have to be filled up to
sixteen.
"""


# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    out,
    x_TE,
    codes_FB,
    scales_GF,
    offsets_GF,
    factors_F,
    token_scales_T,
    bias_F,
    rows,
    features,
    depth,
    group,
    stride_x,
    stride_codes,
    stride_out,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    F: tl.constexpr,
    T: tl.constexpr,
    J: tl.constexpr,
    UNROLL: tl.constexpr,
    SCALES_FIRST: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Programs of the same outputs follow each other, so that the weight is read from memory once.

    With splits, `out` gets the sums of each, [SPLITS, rows, features]; without, the result. Integer activations
    have a scale for each token.
    """
    IS_INTEGER: tl.constexpr = x_TE.dtype.element_ty == tl.int8
    token_tiles = tl.cdiv(rows, T)
    tokens_T = (tl.program_id(0) % token_tiles) * T + tl.arange(0, T)
    features_F = (tl.program_id(0) // token_tiles) * F + tl.arange(0, F)
    mask_T, mask_F = tokens_T < rows, features_F < features
    columns_J = tl.arange(0, J)
    x_JT = x_TE + tokens_T.to(tl.int64)[None, :] * stride_x + columns_J[:, None]
    codes_FJ = codes_FB + features_F.to(tl.int64)[:, None] * stride_codes + columns_J[None, :]

    tiles = stride_codes // J
    count = tl.cdiv(tl.cdiv(tiles, UNROLL), SPLITS) * UNROLL
    first = tl.program_id(1) * count
    sums_FT = tl.zeros((F, T), tl.int32 if IS_INTEGER else tl.float32)
    for start in range(first, tl.minimum(first + count, tiles), UNROLL):
        for step in tl.static_range(UNROLL):
            tile = start + step
            stored = tl.where(tile < tiles, features, 0)
            bytes_FJ = tl.load(codes_FJ + tile * J, mask=(features_F < stored)[:, None], other=0)
            for half in tl.static_range(8 // BITS):
                if BITS == 4:
                    # As many planes of low halves as of high ones are before this one.
                    base = tile * J + (tile * J // PLANE + half) * PLANE
                    values_FJ = ((bytes_FJ.to(tl.uint8, bitcast=True) >> (4 * half)) & 15).to(tl.int8) - ZERO
                else:
                    base = tile * J
                    values_FJ = bytes_FJ
                mask_JT = (base + columns_J < depth)[:, None] & mask_T[None, :]
                x = tl.load(x_JT + base, mask=mask_JT, other=0)
                if HAS_SCALES:
                    place_F = (base // group).to(tl.int64) * features + features_F
                    is_there_F = features_F < tl.where(base < depth, features, 0)
                    scale_F = tl.load(scales_GF + place_F, mask=is_there_F, other=0.0).to(tl.float32)
                    if HAS_OFFSETS:
                        offset_F = tl.load(offsets_GF + place_F, mask=is_there_F, other=0.0).to(tl.float32)
                if SCALES_FIRST:
                    weight_FJ = values_FJ.to(tl.float32) * scale_F[:, None]
                    if HAS_OFFSETS:
                        weight_FJ += offset_F[:, None]
                    sums_FT = tl.dot(weight_FJ.to(x.dtype), x, sums_FT, input_precision="ieee")
                elif HAS_SCALES:
                    sums_FT += tl.dot(values_FJ.to(x.dtype), x, input_precision="ieee") * scale_F[:, None]
                    if HAS_OFFSETS:
                        sums_FT += offset_F[:, None] * tl.sum(x.to(tl.float32), 0)[None, :]
                elif IS_INTEGER:
                    sums_FT = tl.dot(values_FJ, x, sums_FT, out_dtype=tl.int32)
                else:
                    sums_FT = tl.dot(values_FJ.to(x.dtype), x, sums_FT, input_precision="ieee")

    mask_FT = mask_F[:, None] & mask_T[None, :]
    if SPLITS > 1:
        rows_T = tl.program_id(1).to(tl.int64) * rows + tokens_T
        tl.store(out + rows_T[None, :] * features + features_F[:, None], sums_FT, mask=mask_FT)
    else:
        value_FT = sums_FT.to(tl.float32) * tl.load(factors_F + features_F, mask=mask_F, other=0.0)[:, None]
        if IS_INTEGER:
            value_FT *= tl.load(token_scales_T + tokens_T, mask=mask_T, other=0.0)[None, :]
        if HAS_BIAS:
            value_FT += tl.load(bias_F + features_F, mask=mask_F, other=0.0).to(tl.float32)[:, None]
        place_FT = tokens_T.to(tl.int64)[None, :] * stride_out + features_F[:, None]
        tl.store(out + place_FT, value_FT.to(out.dtype.element_ty), mask=mask_FT)


@triton.jit
def sum_kernel(
    out_TF,
    sums_STF,
    factors_F,
    token_scales_T,
    bias_F,
    features,
    stride_out,
    HAS_BIAS: tl.constexpr,
    F: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Adds up the splits of a row, always in the same order, and finishes as the product without splits does."""
    IS_INTEGER: tl.constexpr = sums_STF.dtype.element_ty == tl.int32
    row = tl.program_id(0).to(tl.int64)
    features_F = tl.program_id(1) * F + tl.arange(0, F)
    mask_F = features_F < features
    rows = tl.num_programs(0)
    sum_F = tl.load(sums_STF + row * features + features_F, mask=mask_F, other=0)
    for split in tl.static_range(1, SPLITS):
        sum_F += tl.load(sums_STF + (split * rows + row) * features + features_F, mask=mask_F, other=0)
    value_F = sum_F.to(tl.float32) * tl.load(factors_F + features_F, mask=mask_F, other=0.0)
    if IS_INTEGER:
        value_F *= tl.load(token_scales_T + row)
    if HAS_BIAS:
        value_F += tl.load(bias_F + features_F, mask=mask_F, other=0.0).to(tl.float32)
    tl.store(out_TF + row * stride_out + features_F, value_F.to(out_TF.dtype.element_ty), mask=mask_F)


@triton.jit
def quantize_kernel(x_TE, codes_TE, scales_T, size, stride_x, TILE: tl.constexpr):
    """A token's largest value becomes 127, or 448 in float8; others are rounded to the nearest, halves to even.

    A token of zeros has scale 1, one with NaN or infinity has infinity.
    """
    IS_INTEGER: tl.constexpr = codes_TE.dtype.element_ty == tl.int8
    LARGEST: tl.constexpr = 127.0 if IS_INTEGER else 448.0
    token = tl.program_id(0).to(tl.int64)
    columns_E = tl.arange(0, TILE)
    largest_E = tl.zeros((TILE,), tl.float32)
    for start in range(0, size, TILE):
        mask_E = start + columns_E < size
        x_E = tl.load(x_TE + token * stride_x + start + columns_E, mask=mask_E, other=0.0).to(tl.float32)
        largest_E = tl.maximum(largest_E, tl.where(x_E == x_E, tl.abs(x_E), float("inf")))
    largest = tl.max(largest_E, 0)
    scale = tl.where(largest > 0, tl.div_rn(largest, LARGEST), 1.0)
    tl.store(scales_T + token, scale)
    for start in range(0, size, TILE):
        mask_E = start + columns_E < size
        x_E = tl.load(x_TE + token * stride_x + start + columns_E, mask=mask_E, other=0.0).to(tl.float32)
        code_E = tl.minimum(tl.maximum(tl.div_rn(x_E, scale), -LARGEST), LARGEST)
        if IS_INTEGER:
            code_E = (code_E + 12582912.0) - 12582912.0  # 1.5 * 2^23 leaves no bits behind the point
        tl.store(codes_TE + token * size + start + columns_E, code_E.to(codes_TE.dtype.element_ty), mask=mask_E)


@triton.jit
def read_kernel(
    out_TE,
    ids_T,
    codes_FB,
    scales_GF,
    offsets_GF,
    factors_F,
    features,
    depth,
    group,
    stride_codes,
    stride_out,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rows of the weight, as an embedding reads them. Rows that another weight has are left as they are."""
    token = tl.program_id(0).to(tl.int64)
    feature = tl.load(ids_T + token).to(tl.int64)
    columns_E = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_there = (feature >= 0) & (feature < features)
    mask_E = columns_E < tl.where(is_there, depth, 0)
    places_E = columns_E
    if BITS == 4:
        places_E = columns_E // (2 * PLANE) * PLANE + columns_E % PLANE
    codes_E = tl.load(codes_FB + feature * stride_codes + places_E, mask=mask_E, other=0)
    if BITS == 4:
        shifts_E = (columns_E // PLANE % 2 * 4).to(tl.uint8)
        codes_E = ((codes_E.to(tl.uint8, bitcast=True) >> shifts_E) & 15).to(tl.int8) - ZERO
    value_E = codes_E.to(tl.float32)
    if HAS_SCALES:
        place_E = (columns_E // group).to(tl.int64) * features + feature
        value_E *= tl.load(scales_GF + place_E, mask=mask_E, other=0.0).to(tl.float32)
        if HAS_OFFSETS:
            value_E += tl.load(offsets_GF + place_E, mask=mask_E, other=0.0).to(tl.float32)
    value_E *= tl.load(factors_F + feature, mask=is_there, other=0.0)
    tl.store(out_TE + token * stride_out + columns_E, value_E.to(out_TE.dtype.element_ty), mask=mask_E)
