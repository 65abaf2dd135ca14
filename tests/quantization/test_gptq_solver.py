"""quantization/gptq_solver.py against the method's definition, column by column in float64 with the whole inverse."""

from __future__ import annotations

import pytest
import torch

from tidewright.quantization.affine import SCHEMES, QuantizationError, Scheme, quantize_rtn
from tidewright.quantization.gptq_solver import _DAMPING, InputProducts, quantize_gptq


def by_definition(weight: torch.Tensor, inputs: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Rounds a column, spreads its error over those behind by the inverse of their products, and goes on (OBQ)."""
    weight, size = weight.double().clone(), scheme.group_size or weight.shape[1]
    products = inputs.double().t() @ inputs.double()
    products += _DAMPING * products.diagonal().mean() * torch.eye(len(products))
    out = torch.empty_like(weight)
    for column in range(weight.shape[1]):
        if column % size == 0:
            group = quantize_rtn(weight[:, column : column + size].float(), scheme)
            scale, offset = group.scales_FG[:, 0].double(), torch.zeros(len(weight)).double()
            if group.offsets_FG is not None:
                offset = group.offsets_FG[:, 0].double()
        low, high = (-127, 127) if scheme.weight_bits == 8 else (0, 15)
        out[:, column] = ((weight[:, column] - offset) / scale).round().clamp(low, high) * scale + offset
        inverse = torch.linalg.inv(products[column:, column:])
        error = (weight[:, column] - out[:, column]) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
    return out.float()


@pytest.mark.parametrize("scheme", ["int4-g32", "int8"])
def test_does_what_the_method_says(scheme: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 160, generator=generator)  # more than a block
    inputs = torch.randn(400, 160, generator=generator) @ torch.randn(160, 160, generator=generator)
    products = InputProducts(160)
    for part in inputs.split(150):
        products.add(part)
    found, expected = quantize_gptq(weight, products, SCHEMES[scheme]), by_definition(weight, inputs, SCHEMES[scheme])
    step = found.scales_FG.max()
    # A value amid two codes may be rounded the other way in float32, and what comes behind it then differs.
    assert ((found.dequantized() - expected).abs() < 1e-3 * step).float().mean() > 0.95
    rounded = quantize_rtn(weight, SCHEMES[scheme]).dequantized()
    errors = [float((inputs @ (some - weight).t()).square().mean()) for some in (found.dequantized(), rounded)]
    assert errors[0] < 0.7 * errors[1]


def test_inputs_that_never_come() -> None:
    inputs = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    inputs[:, 5] = 0
    inputs[:, 6] = inputs[:, 7]  # and two that always come together
    products = InputProducts(64)
    products.add(inputs)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    found = quantize_gptq(weight, products, SCHEMES["int4-g32"])
    assert (found.dequantized() - weight).abs().max() < 1


def test_few_tokens_for_many_inputs() -> None:
    """Their products have hardly a rank, and large numbers beside small ones."""
    inputs = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 256)
    products = InputProducts(256)
    products.add(inputs)
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    assert quantize_gptq(weight, products, SCHEMES["int4-g32"]).dequantized().isfinite().all()


def test_inputs_that_are_no_numbers() -> None:
    products = InputProducts(64)
    products.add(torch.full((4, 64), float("nan")))
    with pytest.raises(QuantizationError, match="longer --calibration text"):
        quantize_gptq(torch.ones(8, 64), products, SCHEMES["int4-g32"])
