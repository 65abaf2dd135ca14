"""devices/cpu/linear.py: every way gives the product, and the number of rows decides which is taken."""

from __future__ import annotations

import pytest
import torch

from tidewright.devices.cpu import linear as cpu_linear
from tidewright.devices.cpu.linear import CpuLinear, native_rows

WAYS = ["native", "onednn", "plain"]
pytestmark = pytest.mark.usefixtures("all_cores")


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(cpu_linear, "choose_ways", lambda dtype: request.param)


def finished(weight_FE: torch.Tensor) -> CpuLinear:
    """Takes the weight away."""
    linear = CpuLinear(*weight_FE.shape)
    linear.weight.data = weight_FE
    linear.finish()
    return linear


def product(x_TE: torch.Tensor, weight_FE: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
    exact = x_TE.double() @ weight_FE.double().T
    return (exact if bias_F is None else exact + bias_F.double()).to(x_TE.dtype)


@pytest.mark.parametrize("choice", [(way,) * 4 for way in WAYS], ids=WAYS, indirect=True)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 9, 50, 130])
@pytest.mark.usefixtures("choice")
def test_every_way(rows: int, with_bias: bool) -> None:
    if not cpu_linear._has_onednn_bf16():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    weight_FE, bias_F = torch.randn(96, 64).bfloat16(), torch.randn(96).bfloat16() if with_bias else None
    x_TE = torch.randn(rows, 64).bfloat16()
    expected = product(x_TE, weight_FE, bias_F)
    torch.testing.assert_close(finished(weight_FE).multiply(x_TE, bias_F), expected, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 8, 9, 48, 49, 128, 129, 300])
def test_the_measured_choice(rows: int, dtype: torch.dtype) -> None:
    weight_FE, x_TE = torch.randn(40, 64).to(dtype), torch.randn(rows, 64).to(dtype)
    expected = product(x_TE, weight_FE, None)
    torch.testing.assert_close(finished(weight_FE).multiply(x_TE, None), expected, atol=1e-4, rtol=0.016)


@pytest.mark.parametrize("choice", [("native", "onednn", "plain", "native")], indirect=True)
@pytest.mark.usefixtures("choice")
def test_the_number_of_rows_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for way in WAYS:
        monkeypatch.setattr(CpuLinear, f"_by_{way}", lambda self, x_TE, bias_F, way=way: way)
    monkeypatch.setattr(cpu_linear, "_reorder", lambda weight_FE: weight_FE)  # also where oneDNN has no bfloat16
    linear = finished(torch.randn(16, 16).bfloat16())
    taken = {rows: linear.multiply(torch.empty(rows, 16), None) for rows in (1, 8, 9, 48, 49, 128, 129)}
    assert list(taken.values()) == ["native"] * 2 + ["onednn"] * 2 + ["plain"] * 2 + ["native"]
    assert native_rows(torch.bfloat16) == 8


@pytest.mark.parametrize("choice", [("native", "onednn", "onednn", "onednn"), ("plain",) * 4], indirect=True)
@pytest.mark.parametrize("features", [96, 97])
@pytest.mark.usefixtures("choice")
def test_every_way_still_has_the_plain_weight(features: int) -> None:
    if not cpu_linear._has_onednn_bf16():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    weight_FE, ids_T, x_TE = torch.randn(features, 64).bfloat16(), torch.tensor([5, 95]), torch.randn(50, 64).bfloat16()
    expected, products = weight_FE[ids_T], product(x_TE, weight_FE, None)
    linear = finished(weight_FE)
    assert torch.equal(linear.read_rows(ids_T), expected)
    torch.testing.assert_close(linear.multiply(x_TE, None), products, atol=0.05, rtol=0.01)
