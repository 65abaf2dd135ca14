"""The kernels of lora.py. No torch: they are compiled ahead as well."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from tidewright.devices.cuda.launch import Launch

ROWS = 16  # of a tile: what tensor cores multiply at once
RANKS = 16  # that a program takes at once; the least that they multiply
SHRINK = Launch({"ROWS": ROWS, "RANKS": RANKS, "E": 128}, warps=4, stages=3)
EXPAND = Launch({"ROWS": ROWS, "RANKS": RANKS, "F": 64}, warps=4, stages=2)


@triton.jit
def shrink_kernel(
    x_TE,
    h_NPR,
    rows_N,
    tiles_M3,
    a_SPRE,
    ranks_SP,
    scales_SP,
    parts,
    most_rank,
    size,
    stride_x,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    E: tl.constexpr,
):
    """scale * x A^T for RANKS ranks of one projection."""
    tile, part, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(tiles_M3 + tile * 3)
    first = tl.load(tiles_M3 + tile * 3 + 1)
    count = tl.load(tiles_M3 + tile * 3 + 2)
    if (count > 0) & (group * RANKS < tl.load(ranks_SP + slot * parts + part)):
        places_M = tl.arange(0, ROWS)
        mask_M = places_M < count
        rows_M = tl.load(rows_N + first + places_M, mask=mask_M, other=0).to(tl.int64)
        ranks_R = group * RANKS + tl.arange(0, RANKS)
        matrix = a_SPRE + (slot * parts + part).to(tl.int64) * most_rank * size
        sum_MR = tl.zeros((ROWS, RANKS), tl.float32)
        for start_e in range(0, size, E):
            cols_E = start_e + tl.arange(0, E)
            mask_E = cols_E < size
            x_ME = tl.load(
                x_TE + rows_M[:, None] * stride_x + cols_E[None, :], mask=mask_M[:, None] & mask_E[None, :], other=0.0
            )
            a_ER = tl.load(matrix + ranks_R[None, :] * size + cols_E[:, None], mask=mask_E[:, None], other=0.0)
            sum_MR = tl.dot(x_ME, a_ER, sum_MR, input_precision="ieee")
        h_MR = sum_MR * tl.load(scales_SP + slot * parts + part)
        to_MR = ((first + places_M)[:, None] * parts + part) * most_rank + ranks_R[None, :]
        tl.store(h_NPR + to_MR, h_MR, mask=mask_M[:, None])


@triton.jit
def expand_kernel(
    h_NPR,
    y_TF,
    rows_N,
    tiles_M3,
    b_SRF,
    ranks_SP,
    ends_P,
    parts,
    most_rank,
    features,
    stride_y,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    F: tl.constexpr,
):
    """Adds h B^T to F outputs of one projection."""
    tile, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(tiles_M3 + tile * 3)
    first = tl.load(tiles_M3 + tile * 3 + 1)
    count = tl.load(tiles_M3 + tile * 3 + 2)
    rank = tl.load(ranks_SP + slot * parts + part)
    end = tl.load(ends_P + part)
    begin = tl.load(ends_P + part - 1, mask=part > 0, other=0)
    outputs_F = begin + block * F + tl.arange(0, F)
    if (count > 0) & (rank > 0) & (begin + block * F < end):
        mask_F = outputs_F < end
        places_M = tl.arange(0, ROWS)
        mask_M = places_M < count
        rows_M = tl.load(rows_N + first + places_M, mask=mask_M, other=0).to(tl.int64)
        matrix = b_SRF + slot.to(tl.int64) * most_rank * features
        sum_MF = tl.zeros((ROWS, F), tl.float32)
        for start_r in range(0, rank, RANKS):
            ranks_R = start_r + tl.arange(0, RANKS)
            from_MR = ((first + places_M)[:, None] * parts + part) * most_rank + ranks_R[None, :]
            h_MR = tl.load(h_NPR + from_MR, mask=mask_M[:, None], other=0.0)
            b_RF = tl.load(matrix + ranks_R[:, None] * features + outputs_F[None, :], mask=mask_F[None, :], other=0.0)
            sum_MF = tl.dot(h_MR, b_RF.to(tl.float32), sum_MF, input_precision="ieee")
        to_MF = y_TF + rows_M[:, None] * stride_y + outputs_F[None, :]
        mask_MF = mask_M[:, None] & mask_F[None, :]
        y_MF = tl.load(to_MF, mask=mask_MF, other=0.0).to(tl.float32) + sum_MF
        tl.store(to_MF, y_MF.to(y_TF.dtype.element_ty), mask=mask_MF)
