"""sampling/lots.py: exponentials by seed and position, against Philox and the logarithm in plain integers and numpy."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.sampling_oracle import chi_square, chi_square_limit
from tidewright.sampling.lots import exponentials, of_words, words


def philox(seed: int, position: int, count: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011) in Python's integers; numpy begins one block behind its counter."""
    found: list[int] = []
    for block in range(1, -(-count // 4) + 1):
        a, b, c, d = block, position, 0, 0
        first, second = seed, 0
        for _ in range(10):
            (high0, low0), (high1, low1) = (
                divmod(0xD2E7470EE14C6C93 * a, 2**64),
                divmod(0xCA5A826395121157 * c, 2**64),
            )
            a, b, c, d = high1 ^ b ^ first, low1, high0 ^ d ^ second, low0
            first, second = (first + 0x9E3779B97F4A7C15) % 2**64, (second + 0xBB67AE8584CAA73B) % 2**64
        found += [a, b, c, d]
    return found[:count]


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1])
@pytest.mark.parametrize("position", [0, 1, 2**31])
def test_words_are_those_of_philox(seed: int, position: int) -> None:
    expected = [philox(seed, position, 10), philox(seed, position + 1, 10)]
    assert words([(seed, position), (seed, position + 1)], 10).tolist() == expected


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    rows = [(seed, 7 * seed) for seed in range(30)]
    together = exponentials(rows, 2439)  # more than one slice, and none ends with a row
    for row, one in enumerate(rows):
        assert np.array_equal(together[row], exponentials([one], 2439)[0])


def test_lots_are_logarithms_of_their_words() -> None:
    """Against float64 over the range of both halves; the values at the ends are written out."""
    halves = np.array([0, 1, 2, 3, 2**8, 2**16 + 1, 2**31 - 1, 2**31, 2**32 - 2**8, 2**32 - 1], dtype=np.uint64)
    halves = np.concatenate([halves, np.random.default_rng(1).integers(0, 2**32, 200, dtype=np.uint64)])
    low, high = (half.ravel() for half in np.meshgrid(halves, halves))
    lots = of_words((high << np.uint64(32)) | low)
    zeros = 31 - np.log2(np.maximum(high, 2**8)).astype(int)
    exact = zeros * np.log(2) - np.log1p(-np.maximum((low >> np.uint64(1)) * 2.0**-31, 2.0**-32) / 2)
    np.testing.assert_allclose(lots, exact, rtol=5e-7)
    assert lots.min() == pytest.approx(2**-33)
    assert lots.max() == pytest.approx(24 * np.log(2))


def test_lots_are_the_same_to_the_bit_on_every_machine() -> None:
    """Written down once: whatever changes them changes what each seed means, and goes into CHANGELOG.md."""
    bits = exponentials([(1, 0), (2**63 - 1, 12345)], 5).view(np.uint32)
    assert bits.tolist() == [
        [1064574094, 1055411280, 1070813105, 1080862707, 1055646747],
        [1055524532, 1049745948, 1041635832, 1037529938, 1053835578],
    ]


def test_lots_are_exponential_and_depend_on_seed_and_position() -> None:
    rows = [(seed, position) for seed in range(100) for position in range(100)]
    lots_SPE = exponentials(rows, 8).reshape(100, 100, 8)
    values = -np.expm1(-lots_SPE.astype(np.float64))  # uniform, if they are exponential
    assert len(np.unique(values)) > 0.99 * values.size
    for scale in (1, 2**-8):  # small lots are the ones that win
        counts, _ = np.histogram(values, bins=20, range=(0, scale))
        assert chi_square(counts, np.full(20, values.size / 20 * scale)) < chi_square_limit(20)
    # Neither neighbouring seeds nor neighbouring positions may give shifted copies of one stream.
    for one, other in [
        (values[:-1, :, 0], values[1:, :, 0]),
        (values[:-1, 1:, 0], values[1:, :-1, 0]),
        (values[:, :-1, 1:], values[:, 1:, :-1]),
    ]:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.05
