"""devices/cuda/norms.py, interpreted on the CPU, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.interpreted import interpreted

with interpreted():
    from tidewright.devices.cuda.norms import MAX_SIZE, add_rms_norm, rms_norm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-5


def tensors(*shape: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[-1])
    x = 3 * torch.randn(shape, generator=generator)
    x[0] *= 1e-3  # where eps counts
    return x.to(dtype), (1 + torch.randn(shape[-1], generator=generator)).to(weight_dtype)


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    values = x.double().numpy()
    normed = values / np.sqrt((values**2).mean(-1, keepdims=True) + EPS) * weight.double().numpy()
    return torch.from_numpy(normed)


def assert_rounded(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Once, at the end."""
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(found.dtype).eps / 2 + 1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "dtype", "weight_dtype"),
    [
        ((1, 576), FP32, FP32),
        ((3, 2048), BF16, BF16),
        ((2, 8192), FP16, FP16),
        ((5, 100), BF16, FP32),  # Gemma's weights are float32
    ],
)
def test_the_norm_and_the_norm_after_an_addition(
    shape: tuple[int, int], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, weight = tensors(*shape, dtype=dtype, weight_dtype=weight_dtype)
    found = rms_norm(x, weight, EPS)
    assert found.dtype == dtype
    assert_rounded(found, exact(x, weight))

    residual = x.flip(0).contiguous()
    before = x.double() + residual.double()
    found, stream = add_rms_norm(x, residual, weight, EPS)
    assert stream.data_ptr() == residual.data_ptr()
    assert torch.equal(stream, before.to(dtype))
    assert_rounded(found, exact(stream, weight))


def test_heads_of_queries_in_their_place_among_keys_and_values() -> None:
    qkv, weight = tensors(3, 11, 64, dtype=BF16, weight_dtype=BF16)
    before = qkv.clone()
    q = qkv[:, :7]
    assert rms_norm(q, weight, EPS, out=q) is q
    assert_rounded(q, exact(before[:, :7], weight))
    assert torch.equal(qkv[:, 7:], before[:, 7:])


def test_rows_that_a_program_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        rms_norm(torch.ones(1, MAX_SIZE + 1), torch.ones(MAX_SIZE + 1), EPS)
    assert rms_norm(torch.ones(0, 64), torch.ones(64), EPS).shape == (0, 64)
