"""devices/cpu/kernels.py against the formulas in float64. bfloat16 results may differ by one rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidewright.devices.cpu.kernels import CpuKernels, KernelArgumentError, kernels_for, kernels_of
from tidewright.kv_cache.storage import LayerCache

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
widths = st.integers(1, 150)  # most are no multiple of a vector
rows = st.integers(1, 21)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=60, deadline=None)
pytestmark = pytest.mark.usefixtures("all_cores")


def native(dtype: torch.dtype) -> CpuKernels:
    kernels = kernels_of(dtype)
    assert kernels, "the tests need g++"
    return kernels


def random(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: torch.Tensor, exact: torch.Tensor, error: float = 1e-6, roundings: int = 1) -> None:
    """`error` relative to the largest exact value, plus so many roundings of the value itself to actual's dtype."""
    assert actual.shape == exact.shape
    ulp = roundings * torch.finfo(actual.dtype).eps / 2
    allowed = exact.abs() * ulp * 1.01 + error * exact.abs().max().clamp(min=1)
    assert ((actual.double() - exact).abs() <= allowed).all()


@quick
@given(dtypes, st.integers(1, 50), st.integers(1, 150), st.integers(1, 100), st.booleans(), seeds)
def test_linear(dtype: torch.dtype, count: int, depth: int, features: int, with_bias: bool, seed: int) -> None:
    x_TE, w_FE = random(seed, dtype, count, depth), random(seed + 1, dtype, features, depth)
    bias_F = random(seed + 2, dtype, features) if with_bias else None
    exact = x_TE.double() @ w_FE.double().T + (bias_F.double() if bias_F is not None else 0)
    # 3e-6: a sum may be small though its parts are not.
    close(native(dtype).linear(x_TE, native(dtype).pack(w_FE), bias_F), exact, error=3e-6)


@DTYPES
@pytest.mark.parametrize("depth", [64, 1537])  # the latter in several parts
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, depth: int) -> None:
    kernels, x_TE, w_FE = native(dtype), random(0, dtype, 300, depth), random(1, dtype, 100, depth)
    exact, weight = x_TE.double() @ w_FE.double().T, kernels.pack(w_FE.clone())
    all_TF = kernels.linear(x_TE, weight)
    close(all_TF, exact, error=1e-5)
    for first, count in [(0, 1), (7, 2), (299, 1), (100, 12), (3, 13), (50, 30), (10, 200)]:
        assert torch.equal(kernels.linear(x_TE[first : first + count], weight), all_TF[first : first + count])


@DTYPES
def test_linear_with_infinity_and_nan(dtype: torch.dtype) -> None:
    x_TE, w_FE = torch.ones(14, 67, dtype=dtype), torch.ones(37, 67, dtype=dtype)
    x_TE[1, 3], x_TE[2, 66], w_FE[36, 66], w_FE[5, 0] = math.inf, math.nan, -math.inf, math.nan
    exact = x_TE.double() @ w_FE.double().T
    torch.testing.assert_close(
        native(dtype).linear(x_TE, native(dtype).pack(w_FE)), exact.to(dtype), equal_nan=True, rtol=0, atol=0
    )


@quick
@given(dtypes, st.integers(0, 50), st.integers(1, 150), st.integers(1, 100), seeds)
def test_embedding(dtype: torch.dtype, count: int, depth: int, features: int, seed: int) -> None:
    w_FE = random(seed, dtype, features, depth)
    ids_T = torch.randint(features, (count,), generator=torch.Generator().manual_seed(seed))
    expected = w_FE[ids_T]
    assert torch.equal(native(dtype).embedding(ids_T, native(dtype).pack(w_FE)), expected)


@DTYPES
def test_a_weight_is_packed_in_place_if_it_can_be(dtype: torch.dtype) -> None:
    fitting_FE, odd_FE = torch.ones(64, 6, dtype=dtype), torch.ones(65, 6, dtype=dtype)
    assert native(dtype).pack(fitting_FE).values is fitting_FE
    assert native(dtype).pack(odd_FE).values is not odd_FE


@quick
@given(dtypes, rows, widths, seeds)
def test_rms_norm(dtype: torch.dtype, count: int, size: int, seed: int) -> None:
    x_TE, weight_E = random(seed, dtype, count, size), random(seed + 1, dtype, size)
    x = x_TE.double()
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight_E.double()
    close(native(dtype).rms_norm(x_TE, weight_E, 1e-5), exact)


@quick
@given(dtypes, rows, widths, seeds)
def test_add_rms_norm(dtype: torch.dtype, count: int, size: int, seed: int) -> None:
    x_TE, residual_TE = random(seed, dtype, count, size), random(seed + 1, dtype, count, size)
    weight_E, total_TE = random(seed + 2, dtype, size), x_TE + residual_TE
    normed_TE, new_TE = native(dtype).add_rms_norm(x_TE, residual_TE, weight_E, 1e-5)
    assert new_TE is residual_TE
    assert torch.equal(new_TE, total_TE)
    assert torch.equal(normed_TE, native(dtype).rms_norm(total_TE, weight_E, 1e-5))


@quick
@given(dtypes, rows, widths, seeds)
def test_silu_and_mul(dtype: torch.dtype, count: int, size: int, seed: int) -> None:
    x_T2F = random(seed, dtype, count, 2 * size) * 8
    gate, up = x_T2F.double().chunk(2, dim=-1)
    close(native(dtype).silu_and_mul(x_T2F), gate * gate.sigmoid() * up, roundings=3)


@DTYPES
def test_silu_of_extreme_values(dtype: torch.dtype) -> None:
    gates = torch.tensor([-1e30, -200.0, -88.5, -87.0, 0.0, 89.0, 1e30, math.nan], dtype=dtype)
    x_T2F = torch.cat((gates, torch.ones(8, dtype=dtype)))[None]
    expected = torch.nn.functional.silu(gates)
    torch.testing.assert_close(native(dtype).silu_and_mul(x_T2F)[0], expected, equal_nan=True, atol=1e-30, rtol=1e-2)


def turned(x_THD: torch.Tensor, angles_TD: torch.Tensor) -> torch.Tensor:
    """Value i and value i + D/2 as a point in the plane, turned by angle i; in complex numbers."""
    first, second = x_THD.double().chunk(2, dim=-1)
    point = torch.complex(first, second) * torch.polar(torch.ones_like(angles_TD), angles_TD)[:, None]
    return torch.cat((point.real, point.imag), dim=-1)


def tables(angles_PD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = angles_PD.cos(), angles_PD.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


HEAD_SIZES = st.sampled_from([2, 16, 36, 64, 80, 128, 256])


@quick
@given(dtypes, rows, st.integers(1, 3), st.integers(1, 3), HEAD_SIZES, st.sampled_from([1, 4, 16]), seeds)
def test_rotate_and_store(
    dtype: torch.dtype, tokens: int, kv_heads: int, group: int, size: int, block_size: int, seed: int
) -> None:
    heads = kv_heads * group
    angles_PD = random(seed, torch.float64, 50, size // 2) * 3
    cos_PD, sin_PD = (table.float() for table in tables(angles_PD))
    qkv_TXD = random(seed, dtype, tokens, heads + 2 * kv_heads, size)
    generator = torch.Generator().manual_seed(seed)
    positions_T = torch.randint(50, (tokens,), generator=generator)
    slots_T = torch.randperm(32, generator=generator)[:tokens]
    k_cache_NSKD = torch.full((32 // block_size, block_size, kv_heads, size), 7.0, dtype=dtype)
    v_cache_NSKD = k_cache_NSKD.clone()
    cache = LayerCache(k_cache_NSKD, v_cache_NSKD)
    q_THD = native(dtype).rotate_and_store(qkv_TXD, cos_PD, sin_PD, positions_T, slots_T, cache)
    expected = turned(qkv_TXD[:, : heads + kv_heads], angles_PD[positions_T])
    close(q_THD, expected[:, :heads])
    keys, values = k_cache_NSKD.flatten(0, 1), v_cache_NSKD.flatten(0, 1)
    close(keys[slots_T], expected[:, heads:])
    assert torch.equal(values[slots_T], qkv_TXD[:, heads + kv_heads :])
    untouched = torch.ones(32, dtype=torch.bool)
    untouched[slots_T] = False
    assert (keys[untouched] == 7).all()
    assert (values[untouched] == 7).all()


def test_another_dtype_or_layout_is_refused() -> None:
    kernels, x_TE, weight_FE = native(torch.float32), torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(KernelArgumentError, match=r"float32 tensor is needed, not torch\.bfloat16"):
        kernels.linear(x_TE.bfloat16(), kernels.pack(weight_FE))
    with pytest.raises(KernelArgumentError, match="contiguous"):
        kernels.pack(torch.ones(4, 3).T)
    with pytest.raises(KernelArgumentError, match="rows of 5, the weight of 4"):
        kernels.linear(torch.ones(2, 5), kernels.pack(weight_FE))


def test_other_dtypes_are_left_to_torch() -> None:
    assert kernels_for(torch.ones(1)) is kernels_of(torch.float32)
    assert kernels_for(torch.ones(1, dtype=torch.float16)) is None
    assert kernels_for(torch.ones(1, device="meta")) is None
