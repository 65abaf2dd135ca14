"""sampling/lots.py in the Triton language: Philox4x64-10 and the exponentials of its words, equal to the bit.

Kernels that call these must be launched with `fuses=False`, or the compiler rounds a product and a sum together.
"""


# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from tidewright.sampling import lots

_LN2 = tl.constexpr(lots.LN2)
_POLYNOMIAL = tl.constexpr(lots.POLYNOMIAL)
_DEGREE = tl.constexpr(len(lots.POLYNOMIAL) - 1)


@triton.jit
def _philox(seed, position, blocks_N):
    """The four words of each of Philox's blocks."""
    zeros_N = blocks_N.to(tl.uint64) * 0
    a_N = blocks_N.to(tl.uint64) + 1  # numpy counts up before it draws
    b_N = zeros_N + position.to(tl.uint64)
    c_N = zeros_N
    d_N = zeros_N
    key_a = seed.to(tl.uint64)
    key_b = key_a * 0
    for _ in tl.static_range(10):
        high_a_N = tl.umulhi(a_N, zeros_N + 0xD2E7470EE14C6C93)
        high_c_N = tl.umulhi(c_N, zeros_N + 0xCA5A826395121157)
        low_a_N = a_N * 0xD2E7470EE14C6C93
        low_c_N = c_N * 0xCA5A826395121157
        a_N = high_c_N ^ b_N ^ key_a
        c_N = high_a_N ^ d_N ^ key_b
        b_N = low_c_N
        d_N = low_a_N
        key_a += 0x9E3779B97F4A7C15
        key_b += 0xBB67AE8584CAA73B
    return a_N, b_N, c_N, d_N


@triton.jit
def words_of(seed, position, first, BLOCKS: tl.constexpr):
    """[4 * BLOCKS] uint64: numpy's words of (seed, position), beginning with word 4 * `first`."""
    a_N, b_N, c_N, d_N = _philox(seed, position, first + tl.arange(0, BLOCKS))
    return tl.reshape(tl.join(tl.join(a_N, c_N), tl.join(b_N, d_N)), [4 * BLOCKS])


@triton.jit
def words_at(seed, position, places_X):
    """The words at any `places_X`; each computes a whole block of Philox, so four times the work."""
    a_X, b_X, c_X, d_X = _philox(seed, position, places_X // 4)
    lane_X = places_X % 4
    return tl.where(lane_X < 2, tl.where(lane_X == 0, a_X, b_X), tl.where(lane_X == 2, c_X, d_X))


@triton.jit
def lots_of(words_X):
    """`lots.of_words`, which explains the steps. The order of the operations matters."""
    low_X = (words_X & 0xFFFFFFFF).to(tl.uint32)
    high_X = (words_X >> 32).to(tl.uint32)
    v_X = tl.maximum((low_X >> 1).to(tl.int32).to(tl.float32), 0.5) * 4.656612873077393e-10  # 2^-31
    x_X = v_X * _POLYNOMIAL[_DEGREE]
    for i in tl.static_range(_DEGREE):
        x_X = (x_X + _POLYNOMIAL[_DEGREE - 1 - i]) * v_X
    bits_X = ((high_X >> 8) | 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    zeros_X = (150 - (bits_X >> 23)).to(tl.float32)
    return x_X + zeros_X * _LN2


@triton.jit
def lots_kernel(words_RE, lots_RE, seeds_R, positions_R, count, BLOCKS: tl.constexpr):
    """Writes a row's words and lots, to compare a device with the CPU."""
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCKS
    words_X = words_of(tl.load(seeds_R + row), tl.load(positions_R + row), first, BLOCKS)
    places_X = first * 4 + tl.arange(0, 4 * BLOCKS)
    mask_X = places_X < count
    tl.store(words_RE + row * count + places_X, words_X.to(tl.int64, bitcast=True), mask=mask_X)
    tl.store(lots_RE + row * count + places_X, lots_of(words_X), mask=mask_X)
