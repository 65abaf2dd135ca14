"""What a quantized key or value is: codes of one byte and a float32 scale for each token and head, in plain torch.

The devices' kernels write the same codes and scales; this is the readable definition, and their oracle.
A vector is scaled by itself alone, so its codes do not depend on the batch, or on how a prompt was cut into chunks.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
INT8 = torch.int8
LARGEST = {INT8: 127.0, FP8: 448.0}
"""Code of a vector's largest number, by the format of the codes."""
SMALLEST_NORMAL = 2.0**-6
"""Of e4m3. A smaller one would be 1/28672 of the vector's largest number at most: it is rounded to this or to 0,
because some processors are slow on what kernels would make of the codes of smaller numbers."""
NEGLIGIBLE = 2.0**-100
"""A vector whose numbers are all smaller is stored as zeros: the inverse of its scale might be infinite."""


def is_quantized(dtype: torch.dtype) -> bool:
    return dtype in LARGEST


def quantize(x_TKD: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, K, D] and scales [T, K]: number = code * scale. Rounds to nearest, ties to even.

    A vector with a NaN or an infinity gets the scale NaN, so that what reads it shows the fault.
    """
    x_TKD = x_TKD.float()
    largest_TK1 = x_TKD.abs().amax(-1, keepdim=True)
    code = torch.full_like(largest_TK1, LARGEST[dtype])  # torch multiplies by the inverse of a plain number
    is_zero_TK1, is_finite_TK1 = largest_TK1 < NEGLIGIBLE, largest_TK1.isfinite()
    scaled_TKD = x_TKD * (code / largest_TK1)
    scaled_TKD = torch.where(is_finite_TK1 & ~is_zero_TK1, scaled_TKD, 0.0)
    scales_TK1 = torch.where(is_zero_TK1, 0.0, largest_TK1 / code)
    scales_TK1 = torch.where(is_finite_TK1, scales_TK1, torch.nan)
    return _codes(scaled_TKD, dtype), scales_TK1[..., 0]


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.float() * scales[..., None]).to(dtype)


def _codes(scaled_TKD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == INT8:
        return scaled_TKD.round().to(dtype)
    size_TKD = scaled_TKD.abs()
    small_TKD = (size_TKD / SMALLEST_NORMAL).round() * SMALLEST_NORMAL
    return torch.where(size_TKD < SMALLEST_NORMAL, small_TKD.copysign(scaled_TKD), scaled_TKD).to(dtype)
