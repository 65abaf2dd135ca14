"""Quantized weights against numpy's arithmetic: rounding, groups, and cuts of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tidewright.quantization import affine
from tidewright.quantization.affine import (
    SCHEMES,
    AffineSource,
    AffineWeight,
    QuantizationError,
    joined,
    quantize_rtn,
    scheme_named,
)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("depth", [32, 200])
def test_every_weight_is_within_half_a_step_of_its_own(name: str, depth: int) -> None:
    torch.manual_seed(depth)
    weight_FE = torch.randn(6, depth) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 0.0, 1.0])[:, None]
    weight_FE[5] = 0.25  # all alike
    made = quantize_rtn(weight_FE, scheme_named(name))
    assert made.group_size == min(SCHEMES[name].group_size or depth, depth)
    scales = np.repeat(made.scales_FG.numpy(), made.group_size, 1)[:, :depth]
    error = np.abs(made.dequantized().numpy() - weight_FE.numpy())
    if made.is_float:  # three bits after the first
        assert (error <= np.maximum(np.abs(weight_FE.numpy()) / 16, scales * 2**-10) * 1.001).all()
    else:
        assert (error <= scales * 0.501).all()
    assert (error[4] == 0).all()


@pytest.mark.parametrize("name", ["int8", "int4-g32", "fp8"])
def test_large_weights_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    weight_FE = torch.randn(7, 64)
    whole = quantize_rtn(weight_FE, scheme_named(name))
    monkeypatch.setattr(affine, "_CHUNK", 200)
    parts = quantize_rtn(weight_FE, scheme_named(name))
    assert torch.equal(parts.dequantized(), whole.dequantized())
    assert parts.get_shape() == [7, 64]


def test_a_symmetric_weight_of_four_bits_uses_them_all() -> None:
    scheme = SCHEMES["int4-g32"].__class__("symmetric", 4, 32)
    codes = torch.arange(-8, 8).repeat(2).float()[None]
    made = quantize_rtn(codes * 0.5, scheme)
    assert made.offsets_FG is None
    assert made.codes_FE.tolist() == codes.int().tolist()
    assert made.scales_FG.tolist() == [[0.5]]


def test_dequantized_is_scale_times_code_plus_offset() -> None:
    codes = torch.tensor([[0, 15, 7, 1, 2], [3, 4, 5, 6, 8]], dtype=torch.int8)
    scales, offsets = torch.tensor([[1.0, 0.5, 2.0], [4.0, 1.0, 1.0]]), torch.tensor([[0.0, -1.0, 1.0]] * 2)
    weight = AffineWeight(codes, scales, offsets, 4, 2)
    assert weight.dequantized().tolist() == [[0, 15, 2.5, -0.5, 5], [12, 16, 4, 5, 9]]


def test_cuts_are_cuts_of_the_whole() -> None:
    weight = quantize_rtn(torch.randn(8, 96), scheme_named("int4-g32"))
    assert isinstance(weight, AffineSource)
    part = weight.cut(slice(2, 5), slice(32, 96))
    assert torch.equal(part.dequantized(), weight.dequantized()[2:5, 32:96])
    channel = quantize_rtn(torch.randn(8, 96), scheme_named("int8")).columns(5, 30)
    assert channel.group_size == 25
    assert channel.scales_FG.shape == (8, 1)
    again = joined([weight.rows(0, 3), weight.rows(3, 8)])
    assert torch.equal(again.dequantized(), weight.dequantized())


def test_a_cut_through_a_group_is_refused_with_the_sizes_that_do() -> None:
    weight = quantize_rtn(torch.randn(4, 1536), scheme_named("int4-g128"))
    with pytest.raises(QuantizationError, match=r"groups of 128 divide among 1, 2, 3, 4, 6, 12 ranks"):
        weight.columns(0, 160)


def test_malformed_weights_are_refused() -> None:
    codes, scales = torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 2)
    for arguments in ((codes, scales, None, 3, 4), (codes, scales, None, 8, 8), (codes.int(), scales, None, 8, 4)):
        with pytest.raises(QuantizationError):
            AffineWeight(*arguments)
    with pytest.raises(QuantizationError, match="int8, w8a8"):
        scheme_named("int5")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SCHEMES)
def test_numbers_that_are_not_finite_are_refused(name: str, value: float) -> None:
    weight = torch.ones(4, 128)
    weight[1, 5] = value
    with pytest.raises(QuantizationError, match="not finite"):
        quantize_rtn(weight, SCHEMES[name])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("depth", [64, 70])
def test_a_rank_may_have_no_rows(name: str, depth: int) -> None:
    """Of a small vocabulary over many."""
    weight = quantize_rtn(torch.ones(0, depth), SCHEMES[name])
    assert weight.dequantized().shape == (0, depth)
