"""devices/base.py and devices/cpu/device.py: the elementwise parts of a layer against the formulas in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.base import Device
from tidewright.devices.cpu.device import CpuDevice

_CPU = torch.device("cpu")
_REFERENCE = ReferenceAttention(16, _CPU)
DEVICES = pytest.mark.parametrize("device", [Device(_CPU, _REFERENCE), CpuDevice(_REFERENCE)], ids=["torch", "kernels"])


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


def close(actual: torch.Tensor, wanted: np.ndarray) -> None:
    error = 1e-9 if actual.dtype == torch.float64 else 2e-6
    np.testing.assert_allclose(actual.numpy(), wanted, rtol=error, atol=error)


def numpy_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norms(device: Device, dtype: torch.dtype) -> None:
    x_TE, residual_TE, weight_E = random(5, 7, dtype=dtype), 3 * random(5, 7, dtype=dtype) - 1, random(7, dtype=dtype)
    close(device.rms_norm(x_TE, weight_E, 0.1), numpy_norm(x_TE.numpy(), weight_E.numpy(), 0.1))
    before = residual_TE.clone()
    normed_TE, sum_TE = device.add_rms_norm(x_TE, residual_TE, weight_E, 0.1)
    close(sum_TE, (x_TE + before).numpy())
    close(normed_TE, numpy_norm((x_TE + before).numpy(), weight_E.numpy(), 0.1))


@DEVICES
@pytest.mark.parametrize("theirs", [LlamaRMSNorm, Gemma2RMSNorm])
def test_norms_in_bfloat16(device: Device, theirs: type[torch.nn.Module]) -> None:
    """Gemma's weight is float32 and only the product is rounded; it must come out to the bit."""
    norm = theirs(64, eps=1e-6).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(0.1 * random(64))
    x_TE = random(9, 64).bfloat16()
    is_gemma = theirs is Gemma2RMSNorm
    weight_E = 1 + norm.weight.float() if is_gemma else norm.weight
    ours_TE = device.rms_norm(x_TE, weight_E.detach(), 1e-6)
    assert ours_TE.dtype == torch.bfloat16
    torch.testing.assert_close(ours_TE, norm(x_TE).detach(), rtol=0 if is_gemma else 0.01, atol=0 if is_gemma else 1e-3)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gated_activations(device: Device, dtype: torch.dtype) -> None:
    gate_up_TF2 = random(5, 12, dtype=dtype)
    gate, up = gate_up_TF2[:, :6].numpy(), gate_up_TF2[:, 6:].numpy()
    close(device.silu_and_mul(gate_up_TF2), gate / (1 + np.exp(-gate)) * up)
    gelu = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    close(device.gelu_tanh_and_mul(gate_up_TF2), gelu * up)
