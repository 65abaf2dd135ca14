"""distributed/cpu_linear.py: every way gives the product, and the number of rows decides which is taken."""

from __future__ import annotations

import pytest
import torch

from tidewright.distributed import cpu_linear
from tidewright.distributed.cpu_linear import CpuLinear

WAYS = ["native", "packed", "float32", "plain"]


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(cpu_linear, "choose_ways", lambda dtype: request.param)


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
    result = CpuLinear(weight_FE, bias_F).multiply(x_TE)
    torch.testing.assert_close(result, product(x_TE, weight_FE, bias_F), atol=0.05, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 8, 9, 48, 49, 128, 129, 300])
def test_the_measured_choice(rows: int, dtype: torch.dtype) -> None:
    weight_FE, x_TE = torch.randn(40, 64).to(dtype), torch.randn(rows, 64).to(dtype)
    torch.testing.assert_close(
        CpuLinear(weight_FE).multiply(x_TE), product(x_TE, weight_FE, None), atol=1e-4, rtol=0.016
    )


@pytest.mark.parametrize("choice", [("native", "packed", "plain", "float32")], indirect=True)
@pytest.mark.usefixtures("choice")
def test_the_number_of_rows_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for way in WAYS:
        monkeypatch.setattr(CpuLinear, f"_by_{way}", lambda self, x_TE, way=way: way)
    linear = CpuLinear(torch.randn(16, 16).bfloat16())
    taken = {rows: linear.multiply(torch.empty(rows, 16)) for rows in (1, 8, 9, 48, 49, 128, 129)}
    assert list(taken.values()) == ["native"] * 2 + ["packed"] * 2 + ["plain"] * 2 + ["float32"]


@pytest.mark.parametrize("choice", [("native", "native", "native", "float32")], indirect=True)
@pytest.mark.usefixtures("choice")
def test_a_huge_weight_is_not_upcast_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "_UPCAST_LIMIT", 16 * 16)
    for way in WAYS:
        monkeypatch.setattr(CpuLinear, f"_by_{way}", lambda self, x_TE, way=way: way)
    x_TE = torch.empty(200, 16)
    assert CpuLinear(torch.randn(16, 16).bfloat16()).multiply(x_TE) == "float32"
    assert CpuLinear(torch.randn(17, 16).bfloat16()).multiply(x_TE) == "native"
