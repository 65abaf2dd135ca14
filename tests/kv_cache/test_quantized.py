"""kv_cache/quantized.py against numpy, and e4m3 against ml_dtypes: every code and every scale."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from helpers.vectors import EXTREMES, vectors
from tidewright.kv_cache.quantized import FP8, INT8, dequantize, quantize
from tidewright.kv_cache.storage import KVCacheShape

F32 = np.float32


def expected(x_D: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.float32]:
    """Codes as bytes, and the scale."""
    zeros = np.zeros(len(x_D), np.uint8)
    if not np.isfinite(x_D).all():
        return zeros, F32(np.nan)
    largest = np.abs(x_D).max()
    if largest < 2.0**-100:
        return zeros, F32(0)
    most = F32(127 if dtype == INT8 else 448)
    scaled_D = x_D * (most / largest)
    if dtype == INT8:
        return np.rint(scaled_D).astype(np.int8).view(np.uint8), largest / most
    size_D = np.abs(scaled_D)
    smallest = 2.0**-6  # normal number: below are that and zero
    size_D = np.where(size_D < smallest, np.where(size_D > smallest / 2, smallest, 0), size_D)
    codes_D = np.copysign(size_D, scaled_D).astype(F32).astype(ml_dtypes.float8_e4m3fn)
    return codes_D.view(np.uint8), largest / most


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_codes_and_scales(dtype: torch.dtype, kind: torch.dtype) -> None:
    x_TKD = vectors(200, 1, 48, kind)
    codes_TKD, scales_TK = quantize(x_TKD, dtype)
    assert codes_TKD.dtype == dtype
    assert scales_TK.dtype == torch.float32
    for x_D, codes_D, scale in zip(x_TKD[:, 0], codes_TKD[:, 0].view(torch.uint8), scales_TK[:, 0], strict=True):
        wanted_D, wanted = expected(x_D.float().numpy(), dtype)
        np.testing.assert_array_equal(codes_D.numpy(), wanted_D)
        np.testing.assert_equal(scale.numpy(), wanted)


@pytest.mark.parametrize(("dtype", "step"), [(INT8, 1 / 254), (FP8, 1 / 28)])
def test_what_is_read_is_near_what_was_written(dtype: torch.dtype, step: float) -> None:
    """Within half a step of the codes at the vector's largest number; a vector that can't be stored shows it."""
    x_TKD = vectors(200, 1, 48)
    read_TKD = dequantize(*quantize(x_TKD, dtype), torch.float32)
    is_sound_T = x_TKD.isfinite().all(-1)[:, 0]
    assert len(EXTREMES) > int((~is_sound_T).sum()) > 0
    error_TKD = (read_TKD - x_TKD).abs()[is_sound_T]
    assert (error_TKD <= step * 1.001 * x_TKD[is_sound_T].abs().amax(-1, keepdim=True) + 2.0**-100).all()
    assert read_TKD[~is_sound_T].isnan().all()


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_a_block_takes_about_half_with_its_scales(head_dim: int, dtype: torch.dtype) -> None:
    sizes = 30, 3, head_dim, 16
    share = KVCacheShape(*sizes, dtype).bytes_per_block / KVCacheShape(*sizes, torch.bfloat16).bytes_per_block
    assert share == (head_dim + 4) / (2 * head_dim)
    assert 0.5 < share <= 0.6
