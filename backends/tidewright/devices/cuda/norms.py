"""RMSNorm, alone and fused with the addition to the residual stream; each row is read once and written once."""


# mypy: allow-untyped-defs

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from tidewright.devices.cuda.launch import Launch, power_of_two, start

if TYPE_CHECKING:
    import torch

MAX_SIZE = 2**15
"""Values of a row, which one program holds in the registers of up to 32 warps."""
_TILE = 1024  # values per program, if rows are shorter (heads)


def launch_of(rows: int, size: int, is_added: bool) -> Launch:
    width = power_of_two(size)
    if width > MAX_SIZE:
        raise ValueError(f"rows of {size} values are too long for the kernel, which takes {MAX_SIZE}")
    tile = min(power_of_two(rows), max(1, _TILE // width))
    constants = {"SIZE": size, "E": width, "ROWS": tile, "IS_ADDED": is_added}
    return Launch(constants, warps=min(32, max(4, tile * width // 1024)), stages=1)


def rms_norm(x: torch.Tensor, weight_E: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype; rounded once, at the end.

    The weight may be float32 with a narrower x (Gemma). x has two or three dimensions; with three, the second may be a
    slice, such as the heads of q in qkv. `out` may be x itself.
    """
    if out is None:
        out = x.new_empty(x.shape)
    _start(x, None, weight_E, out, eps)
    return out


def add_rms_norm(
    x_TE: torch.Tensor, residual_TE: torch.Tensor, weight_E: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm(x + residual), and x + residual, which is rounded before the norm and replaces residual in memory."""
    assert residual_TE.is_contiguous()
    assert x_TE.is_contiguous()
    assert x_TE.shape == residual_TE.shape
    out_TE = x_TE.new_empty(x_TE.shape)
    _start(x_TE, residual_TE, weight_E, out_TE, eps)
    return out_TE, residual_TE


def _start(
    x: torch.Tensor, residual: torch.Tensor | None, weight_E: torch.Tensor, out: torch.Tensor, eps: float
) -> None:
    size = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    rows = x.shape[0] * heads
    for tensor in (x, out):
        assert tensor.stride()[1:] == ((1,) if tensor.dim() == 2 else (size, 1)), "a row's heads lie side by side"
    launch = launch_of(rows, size, residual is not None)
    if rows:
        start(
            rms_norm_kernel,
            (-(-rows // launch.constants["ROWS"]),),
            launch,
            x,
            x if residual is None else residual,
            weight_E,
            out,
            rows,
            heads,
            x.stride(0),
            out.stride(0),
            eps,
        )


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight_E,
    out,
    rows,
    heads,
    stride_x,
    stride_out,
    eps,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    IS_ADDED: tl.constexpr,
):
    """A token has `heads` rows, side by side; tokens lie a stride apart."""
    rows_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols_E = tl.arange(0, E)
    mask_RE = (rows_R < rows)[:, None] & (cols_E < SIZE)[None, :]
    tokens_R = (rows_R // heads).to(tl.int64)
    within_RE = (rows_R % heads)[:, None] * SIZE + cols_E[None, :]

    x_RE = tl.load(x + tokens_R[:, None] * stride_x + within_RE, mask=mask_RE, other=0.0).to(tl.float32)
    if IS_ADDED:
        sum_RE = residual + tokens_R[:, None] * SIZE + within_RE
        added_RE = (x_RE + tl.load(sum_RE, mask=mask_RE, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(sum_RE, added_RE, mask=mask_RE)
        x_RE = added_RE.to(tl.float32)
    factor_R = 1.0 / tl.sqrt_rn(tl.sum(x_RE * x_RE, 1) / SIZE + eps)
    weight_E = tl.load(weight_E + cols_E, mask=cols_E < SIZE, other=0.0).to(tl.float32)
    normed_RE = x_RE * factor_R[:, None] * weight_E[None, :]
    out_RE = out + tokens_R[:, None] * stride_out + within_RE
    tl.store(out_RE, normed_RE.to(out.dtype.element_ty), mask=mask_RE)
