"""Codes of a quantized KV cache in the Triton language, as kv_cache/quantized.py defines them. Device code.

Conversions of e4m3 are made of integer operations: sm_80 has no instructions for it, and so all cards run one code.
"""


# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def numbers_of(codes, CODES: tl.constexpr, TYPE: tl.constexpr):
    """What a cache holds, as TYPE: plain numbers, or codes, exactly. Those of fp8 come without a factor of 2^8."""
    if CODES == 2:
        # Sign, exponent and mantissa where float16 has them. Bit 14 is a copy of the sign.
        halves = (codes.to(tl.int16) << 7) & -16385
        return halves.to(tl.float16, bitcast=True).to(tl.float32).to(TYPE)
    return codes.to(TYPE)


@triton.jit
def unit_of(CODES: tl.constexpr):
    """The factor that is missing."""
    return 256.0 if CODES == 2 else 1.0


@triton.jit
def largest_bits(x_XD):
    """Of each row: the largest magnitude, as bits of float32. As integers, NaN is above infinity, above all others."""
    return tl.max(x_XD.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)


@triton.jit
def scales_of(bits_X, CODES: tl.constexpr):
    """From `largest_bits`: what numbers are multiplied by to be codes, and the scales that are stored."""
    LARGEST: tl.constexpr = 448.0 if CODES == 2 else 127.0
    largest_X = bits_X.to(tl.float32, bitcast=True)
    is_finite_X = bits_X < 0x7F800000
    is_stored_X = is_finite_X & (largest_X >= 7.888609052210118e-31)  # 2^-100
    code_X = tl.full(largest_X.shape, LARGEST, tl.float32)
    factors_X = tl.where(is_stored_X, tl.div_rn(code_X, tl.where(is_stored_X, largest_X, 1.0)), 0.0)
    scales_X = tl.where(is_stored_X, tl.div_rn(largest_X, code_X), 0.0)
    return factors_X, tl.where(is_finite_X, scales_X, float("nan"))


@triton.jit
def codes_of(x_XD, factors_X, CODES: tl.constexpr):
    """int8 or the bits of e4m3, as int8. A factor of 0 gives zeros."""
    scaled_XD = tl.where(factors_X[:, None] > 0.0, x_XD, 0.0) * factors_X[:, None]
    bits_XD = scaled_XD.to(tl.int32, bitcast=True)
    size_XD = bits_XD & 0x7FFFFFFF
    number_XD = size_XD.to(tl.float32, bitcast=True)
    if CODES == 2:
        rounded_XD = (size_XD + 0x7FFFF + ((size_XD >> 20) & 1)) >> 20
        # Below the smallest normal number, 2^-6, there are that and zero.
        small_XD = tl.where(number_XD > 0.0078125, 8, 0)
        code_XD = tl.where(number_XD < 0.015625, small_XD, rounded_XD - (120 << 3))
        return (code_XD | ((bits_XD >> 24) & 0x80)).to(tl.int8)
    whole_XD = (number_XD + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000  # 2^23: adding it rounds
    return tl.where(bits_XD < 0, -whole_XD, whole_XD).to(tl.int8)
