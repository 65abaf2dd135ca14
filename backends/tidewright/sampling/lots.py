"""The random numbers of a draw: exponentials that depend only on seed and position, bit-equal on every device.

A row's token is drawn by `truncation.race`, in which each candidate has an exponentially distributed lot. Lot j of
(seed, position) is made of word j of numpy's Philox4x64-10 with that key, and `position << 64` as its counter:

- the upper half gives the multiples of ln 2: its number of leading zeros is k with probability 2^-(k+1);
- the lower half, as v in (0, 1], gives the rest: x = -ln(1 - v/2) is in (0, ln 2] and exponentially distributed there.

As the exponential distribution has no memory, k ln 2 + x is exponential. Only x needs a logarithm, and those of
libraries differ in the last bit between processors. So x is a polynomial in v with a relative error of 3e-7: float32
products and sums in a fixed order, each rounded on its own (no fused multiply-add), which IEEE 754 defines to the bit.
The rest is integer arithmetic. Small lots, which decide the race, have the same relative precision as large ones. k is
at most 23, so lots end at 24 ln 2 = 16.6.

Changing this changes what each seed draws. devices/cuda/lot_kernels.py is the same on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LN2 = 0.6931471824645996
"""Rounded to float32, as all constants here."""
POLYNOMIAL = (
    0.4999999403953552,
    0.12500804662704468,
    0.04150085523724556,
    0.016904814168810844,
    0.0015111892716959119,
    0.011790444143116474,
    -0.008094054646790028,
    0.0045258360914886,
)
"""Coefficients of -ln(1 - v/2) / v on [0, 1], interpolated at Chebyshev nodes."""


_SLICE = 2**14
"""Words per pass, so that they and the intermediate arrays stay in a core's cache."""


def words(rows: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    """[len(rows), count] uint64 of Philox for rows of (seed, position). Philox can start anywhere in its stream."""
    # Not numpy's own exponentials: they reject words, which no device can follow.
    words_RE = np.empty((len(rows), count), dtype=np.uint64)
    philox = np.random.Philox(key=0)
    state = philox.state
    for row, (seed, position) in enumerate(rows):
        state["state"]["key"][0] = seed
        state["state"]["counter"][1] = position
        philox.state = state  # in half the time of a new generator
        words_RE[row] = philox.random_raw(count)
    return words_RE


def exponentials(rows: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    """[len(rows), count] float32, > 0 and ~ Exp(1), for rows of (seed, position)."""
    words_X = words(rows, count).ravel()
    lots_X = np.empty(len(words_X), dtype=np.float32)
    for start in range(0, len(words_X), _SLICE):
        lots_X[start : start + _SLICE] = of_words(words_X[start : start + _SLICE])
    return lots_X.reshape(len(rows), count)


def of_words(words_X: np.ndarray) -> np.ndarray:
    low_X, high_X = (words_X.astype("<u8", copy=False).view("<u4")[half::2] for half in (0, 1))
    # 31 bits, as int32 converts faster than uint32.
    v_X = (low_X >> 1).view(np.int32).astype(np.float32)
    np.maximum(v_X, np.float32(0.5), out=v_X)
    v_X *= np.float32(2**-31)
    x_X = v_X * np.float32(POLYNOMIAL[-1])
    for coefficient in POLYNOMIAL[-2::-1]:
        x_X += np.float32(coefficient)
        x_X *= v_X
    # 24 bits are exact in float32, and its exponent gives the leading zeros.
    bits_X = ((high_X >> 8) | 1).view(np.int32).astype(np.float32).view(np.int32)
    zeros_X = (np.int32(127 + 23) - (bits_X >> 23)).astype(np.float32)
    zeros_X *= np.float32(LN2)
    x_X += zeros_X
    return x_X
