"""How llama.cpp's quantized types lie in memory: blocks of bytes to codes, scales and offsets, nothing rounded.

Only types whose weights are scale * code + offset in groups are here; the others are no affine weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Decoded = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Of N blocks: codes [N, elements] int8, scales [N, groups] float32, and offsets as scales, or None."""


class BlockType(NamedTuple):
    elements: int  # of a block
    bytes: int
    group_size: int
    bits: int
    """4, or 8 for codes that need more: those of 5 and 6 bits."""
    has_offsets: bool
    decode: Callable[[np.ndarray], Decoded]


def _float16(blocks: np.ndarray, at: int) -> np.ndarray:
    """A column of float16 numbers, as float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def flat(rows: np.ndarray) -> np.ndarray:
    """All but the first dimension as one, also of no rows, for which NumPy does not infer it."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def _nibbles(packed: np.ndarray, run: int) -> np.ndarray:
    """Runs of `run` bytes: all their low halves, then all their high ones."""
    runs = packed.reshape(len(packed), packed.shape[1] // run, 1, run)
    return flat(np.concatenate((runs & 15, runs >> 4), axis=2))


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """Of 32 codes in 4 bytes, the lowest first; in their place, as 0 or 16."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> Decoded:
    return _nibbles(blocks[:, 2:], 16).view(np.int8) - np.int8(8), _float16(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> Decoded:
    return _nibbles(blocks[:, 4:], 16).view(np.int8), _float16(blocks, 0), _float16(blocks, 2)


def _q5_0(blocks: np.ndarray) -> Decoded:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return codes.view(np.int8) - np.int8(16), _float16(blocks, 0), None


def _q5_1(blocks: np.ndarray) -> Decoded:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return codes.view(np.int8), _float16(blocks, 0), _float16(blocks, 2)


def _q8_0(blocks: np.ndarray) -> Decoded:
    return blocks[:, 2:].view(np.int8), _float16(blocks, 0), None


def _scales_of_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight offsets of a Q4_K or Q5_K block, each from 6 bits."""
    low, middle, high = (blocks[:, 4 + 4 * part : 8 + 4 * part] for part in range(3))
    # The first four stand in the low six bits; of the last four, the upper two bits stand above those.
    scales = np.concatenate((low & 63, (high & 15) | ((low >> 2) & 48)), axis=1)
    offsets = np.concatenate((middle & 63, (high >> 4) | ((middle >> 2) & 48)), axis=1)
    d, d_min = _float16(blocks, 0), _float16(blocks, 2)
    return d * scales.astype(np.float32), -(d_min * offsets.astype(np.float32))


def _q4_k(blocks: np.ndarray) -> Decoded:
    return _nibbles(blocks[:, 16:], 32).view(np.int8), *_scales_of_k(blocks)


def _q5_k(blocks: np.ndarray) -> Decoded:
    # Bit b of byte i belongs to code 32 b + i.
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = _nibbles(blocks[:, 48:], 32) | (flat(fifth) << 4)
    return codes.view(np.int8), *_scales_of_k(blocks)


def _q6_k(blocks: np.ndarray) -> Decoded:
    low = _nibbles(blocks[:, :128], 64)
    # Four codes a byte, 32 bytes apart, twice.
    pairs = blocks[:, 128:192].reshape(len(blocks), 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    codes = low | flat((pairs & 3) << 4)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return codes.view(np.int8) - np.int8(32), _float16(blocks, 208) * scales, None


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, 32, 4, False, _q4_0),
    "Q4_1": BlockType(32, 20, 32, 4, True, _q4_1),
    "Q5_0": BlockType(32, 22, 32, 8, False, _q5_0),
    "Q5_1": BlockType(32, 24, 32, 8, True, _q5_1),
    "Q8_0": BlockType(32, 34, 32, 8, False, _q8_0),
    "Q4_K": BlockType(256, 144, 32, 4, True, _q4_k),
    "Q5_K": BlockType(256, 176, 32, 8, True, _q5_k),
    "Q6_K": BlockType(256, 210, 16, 8, False, _q6_k),
}
