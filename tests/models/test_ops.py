"""models/ops.py against the formulas in numpy, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tidewright.models import ops


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def close(actual: torch.Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-9, atol=1e-12)


def numpy_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def test_norms() -> None:
    x_TE, residual_TE, weight_E = random(5, 7), 3 * random(5, 7) - 1, random(7)
    close(ops.rms_norm(x_TE, weight_E, 0.1), numpy_norm(x_TE.numpy(), weight_E.numpy(), 0.1))
    before = residual_TE.clone()
    normed_TE, sum_TE = ops.add_rms_norm(x_TE, residual_TE, weight_E, 0.1)
    close(sum_TE, (x_TE + before).numpy())
    close(normed_TE, numpy_norm((x_TE + before).numpy(), weight_E.numpy(), 0.1))


@pytest.mark.parametrize("theirs", [LlamaRMSNorm, Gemma2RMSNorm])
def test_norms_in_bfloat16(theirs: type[torch.nn.Module]) -> None:
    """Gemma's weight is float32 and only the product is rounded; it must come out to the bit."""
    norm = theirs(64, eps=1e-6).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(0.1 * random(64))
    x_TE = random(9, 64).bfloat16()
    is_gemma = theirs is Gemma2RMSNorm
    weight_E = 1 + norm.weight.float() if is_gemma else norm.weight
    ours_TE = ops.rms_norm(x_TE, weight_E.detach(), 1e-6)
    assert ours_TE.dtype == torch.bfloat16
    torch.testing.assert_close(ours_TE, norm(x_TE).detach(), rtol=0 if is_gemma else 0.01, atol=0 if is_gemma else 1e-3)


def test_gated_activations() -> None:
    gate_up_TF2 = random(5, 12)
    gate, up = gate_up_TF2[:, :6].numpy(), gate_up_TF2[:, 6:].numpy()
    close(ops.silu_and_mul(gate_up_TF2), gate / (1 + np.exp(-gate)) * up)
    gelu = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    close(ops.gelu_tanh_and_mul(gate_up_TF2), gelu * up)
