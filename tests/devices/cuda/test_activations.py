"""devices/cuda/activations.py, interpreted on the CPU, against numpy in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from helpers.interpreted import interpreted

with interpreted():
    from tidewright.devices.cuda.activations import gelu_tanh_and_mul, silu_and_mul

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("kernel", "function"), [(silu_and_mul, silu), (gelu_tanh_and_mul, gelu)])
def test_activations(
    kernel: Callable[[torch.Tensor], torch.Tensor], function: Callable[[np.ndarray], np.ndarray], dtype: torch.dtype
) -> None:
    """A row's end is in a tile of its own, and the rows lie apart."""
    size = 1100
    wide = 2 * torch.randn((3, 2 * size + 8), generator=torch.Generator().manual_seed(1))
    wide[1, :4] = torch.tensor([60.0, -60.0, 0.0, -0.0])  # where exponents over- and underflow
    x = wide.to(dtype)[:, : 2 * size]
    gate, up = x.double().numpy()[:, :size], x.double().numpy()[:, size:]
    found = kernel(x)
    assert found.dtype == dtype
    expected = torch.from_numpy(function(gate) * up)
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps + 2e-5, atol=2e-7)
    if dtype != FP32:  # the activation is rounded before it is multiplied
        rounded = torch.from_numpy(function(gate)).to(dtype)
        assert float((found == rounded * x[:, size:]).float().mean()) > 0.99


def test_no_rows() -> None:
    assert silu_and_mul(torch.empty(0, 8)).shape == (0, 4)
