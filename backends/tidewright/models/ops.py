"""The elementwise pieces of the decoder, as plain functions: what a fused kernel may replace stands here only."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tidewright.devices.cpu.kernels import kernels_for


def rms_norm(x_TE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's type.

    A float32 weight beside a narrower x (Gemma's) means that only the product is rounded.
    """
    if weight_E.dtype != x_TE.dtype:
        return F.rms_norm(x_TE.to(weight_E.dtype), weight_E.shape, weight_E, eps).to(x_TE.dtype)
    if native := kernels_for(x_TE):
        return native.rms_norm(x_TE, weight_E, eps)
    return F.rms_norm(x_TE, weight_E.shape, weight_E, eps)


def add_rms_norm(
    x_TE: torch.Tensor, residual_TE: torch.Tensor, weight_E: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and that sum: the residual stream after this addition.

    The sum may take the place of `residual_TE` in memory.
    """
    if (native := kernels_for(x_TE)) and weight_E.dtype == x_TE.dtype:
        return native.add_rms_norm(x_TE, residual_TE, weight_E, eps)
    residual_TE = x_TE + residual_TE
    return rms_norm(residual_TE, weight_E, eps), residual_TE


def silu_and_mul(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [gate, up] side by side."""
    if native := kernels_for(gate_up_TF2):
        return native.silu_and_mul(gate_up_TF2)
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def gelu_tanh_and_mul(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up of [gate, up] side by side, with the tanh approximation of gelu."""
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.gelu(gate_TF, approximate="tanh") * up_TF
