"""quantization/gguf_types.py against gguf's own dequantization, of any bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from tidewright.quantization.gguf_types import BLOCK_TYPES


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_decodes_as_gguf_does(name: str) -> None:
    block, theirs = BLOCK_TYPES[name], gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[theirs] == (block.elements, block.bytes)
    packed = np.random.default_rng(0).integers(0, 256, (64, block.bytes), dtype=np.uint8)
    codes, scales, offsets = block.decode(packed)
    assert (codes.dtype, scales.dtype, (offsets is not None)) == (np.int8, np.float32, block.has_offsets)
    weights = codes.reshape(64, -1, block.group_size).astype(np.float32) * scales[:, :, None]
    if offsets is not None:
        weights += offsets[:, :, None]
    np.testing.assert_array_equal(weights.reshape(64, -1), dequantize(packed, theirs))
    # A rank may have no rows of a weight.
    empty = block.decode(packed[:0])
    assert [None if one is None else one.shape[1] for one in empty] == [
        None if one is None else one.shape[1] for one in (codes, scales, offsets)
    ]
    most = 15 if block.bits == 4 else 127
    assert -8 <= codes.min() <= codes.max() <= most or block.bits == 8
