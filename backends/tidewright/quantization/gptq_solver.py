"""GPTQ (Frantar et al. 2022): rounds a weight's columns one after the other, and lets those behind make up for it.

What counts is the layer's output, so it needs to know what comes in: the products of inputs, summed over a text.
"""

from __future__ import annotations

import torch

from tidewright.quantization.affine import AffineWeight, QuantizationError, Scheme, quantize_rtn

_DAMPING = 0.01  # of the mean of the diagonal: without, inputs that always come together spoil the inverse
_BLOCK = 128  # columns after which those behind the block make up for it, in one product


class InputProducts:
    """The sum of x x^T over all inputs x of a layer."""

    def __init__(self, in_features: int) -> None:
        self.sum_EE = torch.zeros(in_features, in_features)

    def add(self, x_TE: torch.Tensor) -> None:
        x_TE = x_TE.float()
        self.sum_EE.addmm_(x_TE.t(), x_TE)


def quantize_gptq(weight_FE: torch.Tensor, products: InputProducts, scheme: Scheme) -> AffineWeight:
    """As `quantize_rtn`, with less error in the layer's outputs."""
    depth = weight_FE.shape[1]
    # By inputs: columns are what is worked on, and so lie together.
    weight_EF = weight_FE.float().t().clone(memory_format=torch.contiguous_format)
    size = scheme.group_size or depth
    inverse_EE = _inverse_factor(products.sum_EE)
    codes_EF = torch.empty_like(weight_EF, dtype=torch.int8)
    scales: list[torch.Tensor] = []
    offsets: list[torch.Tensor] = []
    for first in range(0, depth, _BLOCK):
        last = min(first + _BLOCK, depth)
        errors_BF = torch.zeros(last - first, weight_EF.shape[1])
        for column in range(first, last):
            if column % size == 0:
                group = quantize_rtn(weight_EF[column : column + size].t(), scheme)
                scales.append(group.scales_FG)
                if group.offsets_FG is not None:
                    offsets.append(group.offsets_FG)
            scale_F = scales[-1][:, 0]
            offset_F = offsets[-1][:, 0] if offsets else torch.zeros(())
            value_F = weight_EF[column]
            code_F = ((value_F - offset_F) / scale_F).round_().clamp_(*_limits(scheme))
            codes_EF[column] = code_F.to(torch.int8)
            error_F = (value_F - (code_F * scale_F + offset_F)) / inverse_EE[column, column]
            weight_EF[column:last].addr_(inverse_EE[column, column:last], error_F, alpha=-1)
            errors_BF[column - first] = error_F
        weight_EF[last:].addmm_(inverse_EE[first:last, last:].t(), errors_BF, alpha=-1)
    offsets_FG = torch.cat(offsets, dim=1) if offsets else None
    codes_FE = codes_EF.t().contiguous()
    return AffineWeight(codes_FE, torch.cat(scales, dim=1), offsets_FG, scheme.weight_bits, min(size, depth))


def _limits(scheme: Scheme) -> tuple[int, int]:
    if scheme.weight_bits == 8:
        return (-127, 127) if scheme.symmetric else (-128, 127)
    return (-8, 7) if scheme.symmetric else (0, 15)


def _inverse_factor(products_EE: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse: row i says how columns from i on make up for an error in column i."""
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        damped_EE = products_EE.clone()
        diagonal_E = damped_EE.diagonal()
        diagonal_E[diagonal_E == 0] = 1  # an input that never came
        diagonal_E += damping * diagonal_E.mean()
        try:
            factor_EE = torch.linalg.cholesky(damped_EE)
            return torch.linalg.cholesky(torch.cholesky_inverse(factor_EE), upper=True)
        except torch.linalg.LinAlgError:
            continue  # more inputs than tokens of text, or such that depend on each other
    raise QuantizationError("GPTQ can't tell its inputs apart; take a longer --calibration text, or --method rtn")
