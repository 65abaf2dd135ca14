"""The activation of the MLP, fused with the product of gate and up."""


# mypy: allow-untyped-defs

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from tidewright.devices.cuda.launch import Launch, start

if TYPE_CHECKING:
    import torch


def launch_of(is_gelu: bool) -> Launch:
    return Launch({"IS_GELU": is_gelu, "TILE": 1024}, warps=4, stages=1)


def silu_and_mul(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [gate, up] side by side. The activation is rounded before the product, as by F.silu."""
    return _start(gate_up_TF2, is_gelu=False)


def gelu_tanh_and_mul(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up with the tanh approximation of gelu, rounded in the same way."""
    return _start(gate_up_TF2, is_gelu=True)


def _start(gate_up_TF2: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    rows, width = gate_up_TF2.shape
    assert gate_up_TF2.stride(1) == 1
    size = width // 2
    out_TF = gate_up_TF2.new_empty((rows, size))
    launch = launch_of(is_gelu)
    if rows:
        # Only the first dimension of a grid may exceed 65,535.
        start(
            activate_kernel,
            (rows, -(-size // launch.constants["TILE"])),
            launch,
            gate_up_TF2,
            out_TF,
            size,
            gate_up_TF2.stride(0),
        )
    return out_TF


@triton.jit
def activate_kernel(gate_up_TF2, out_TF, size, stride, IS_GELU: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols_F = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask_F = cols_F < size
    gate_F = tl.load(gate_up_TF2 + row * stride + cols_F, mask=mask_F, other=0.0)
    up_F = tl.load(gate_up_TF2 + row * stride + size + cols_F, mask=mask_F, other=0.0)
    x_F = gate_F.to(tl.float32)
    power_F = x_F
    if IS_GELU:
        # 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2u)): gelu is x times a logistic function. The factor is 2 sqrt(2 / pi).
        power_F = 1.5957691216057308 * (x_F + 0.044715 * x_F * x_F * x_F)
    active_F = (x_F / (1.0 + tl.exp(-power_F))).to(gate_F.dtype)
    product_F = active_F.to(tl.float32) * up_F.to(tl.float32)
    tl.store(out_TF + row * size + cols_F, product_F.to(gate_F.dtype), mask=mask_F)
