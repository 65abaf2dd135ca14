"""Weights of 8 bits, as onnxruntime's MatMulNBits and GatherBlockQuantized read them.

Each block of a row has a scale of its own, and so has, when the graph runs, each block of each row of activations. That
keeps a request's result independent of its batch, which a scale for a whole tensor (DynamicQuantizeLinear) does not.
"""

from __future__ import annotations

import numpy as np

DOMAIN = "com.microsoft"
BLOCK = 32
_ZERO = 128  # the code of 0.0: what both operators take if they are told nothing


def codes_name(weight: str) -> str:
    return f"{weight}.codes"


def scales_name(weight: str) -> str:
    return f"{weight}.scales"


def blocks(depth: int) -> int:
    return -(-depth // BLOCK)


def quantize(weight_FE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [F, blocks, BLOCK] of uint8 and scales [F, blocks] of float32; the last block is filled up with zeros."""
    rows, depth = weight_FE.shape
    count = blocks(depth)
    padded = np.pad(weight_FE, ((0, 0), (0, count * BLOCK - depth))).reshape(rows, count, BLOCK)
    scales = np.abs(padded).max(axis=-1) / np.float32(127)
    scales[scales == 0] = 1
    codes = np.rint(padded / scales[..., None]) + _ZERO
    return codes.astype(np.uint8), scales
