"""source/quantized.cpp against numpy: integer sums to the bit; scales, groups, tails, extremes, rows on their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tidewright.devices.cpu.kernels import KernelArgumentError
from tidewright.devices.cpu.quantized import (
    ACTIVATION_GROUP,
    PackedQuantizedWeight,
    QuantizedKernels,
    can_pack,
    quantized_kernels_of,
)
from tidewright.quantization.affine import AffineWeight, QuantizationError, Scheme, quantize_rtn, scheme_named
from tidewright.quantization.input_order import InputOrder

pytestmark = pytest.mark.usefixtures("all_cores")
GROUPED4 = Scheme("symmetric", 4, 32)
GROUPED8 = Scheme("groups of 8 bits", 8, 16)
ASYMMETRIC8 = Scheme("asymmetric", 8, 32, symmetric=False)
SHAPES = [(1, 8, 5), (2, 576, 96), (13, 100, 33), (12, 1600, 70), (25, 64, 32), (200, 200, 40)]
SCHEMES = [*(scheme_named(name) for name in ("int8", "int4-g32", "int4-g128")), GROUPED4, GROUPED8, ASYMMETRIC8]


def kernels(dtype: torch.dtype = torch.float32) -> QuantizedKernels:
    made = quantized_kernels_of(dtype)
    assert made
    return made


def random_weight(features: int, depth: int, scheme: Scheme, seed: int = 0) -> AffineWeight:
    return quantize_rtn(torch.randn(features, depth, generator=torch.Generator().manual_seed(seed)), scheme)


def multiplied(x: np.ndarray, weight: AffineWeight, group: int) -> np.ndarray:
    """What the kernels compute, in float64: x rounded to 127ths of the largest of its group, then the product."""
    out = np.zeros((x.shape[0], weight.codes_FE.shape[0]))
    dequantized = weight.dequantized().numpy().astype(np.float64)
    for first in range(0, x.shape[1], group):
        part = x[:, first : first + group]
        most = np.abs(part).max(1, keepdims=True)
        factor = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
        codes = np.rint((part * factor).astype(np.float32)).astype(np.float64)
        out += (codes * (most / np.float32(127))) @ dequantized[:, first : first + group].T
    return out


def _sizes(weight: AffineWeight) -> tuple[torch.Tensor, torch.Tensor | None]:
    return weight.scales_FG.abs(), None if weight.offsets_FG is None else weight.offsets_FG.abs()


def group_of(weight: AffineWeight) -> int:
    return weight.group_size if weight.group_size < weight.codes_FE.shape[1] else ACTIVATION_GROUP


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("rows", "depth", "features"), SHAPES)
def test_products(rows: int, depth: int, features: int, scheme: Scheme) -> None:
    weight = random_weight(features, depth, scheme)
    packed = PackedQuantizedWeight([weight])
    x_TE, bias_F = torch.randn(rows, depth), torch.randn(features)
    expected = multiplied(x_TE.numpy(), weight, group_of(weight))
    actual = kernels().linear(x_TE, packed, bias_F).numpy()
    # Scales and offsets of groups are rounded to 11 bits.
    absolute = AffineWeight(weight.codes_FE.clamp(min=-127).abs(), *_sizes(weight), weight.bits, weight.group_size)
    error = 2**-11 * np.abs(x_TE.numpy()) @ absolute.dequantized().numpy().T + 1e-5
    assert (np.abs(actual - (expected + bias_F.numpy())) <= error).all()


@pytest.mark.parametrize(("bits", "group"), [(8, ACTIVATION_GROUP), (4, 32), (4, 128)])
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(("rows", "depth", "features"), [(1, 4096, 33), (14, 520, 40), (3, 7, 1)])
def test_integer_sums_are_exact(rows: int, depth: int, features: int, bits: int, group: int, extreme: bool) -> None:
    """With scales of 1, a product is its groups' integers, added up as float32 in order."""
    low, high = (-128, 127) if bits == 8 else (0, 15)
    generator = np.random.default_rng(depth)
    codes = generator.integers(low, high + 1, (features, depth))
    x = generator.integers(-127, 128, (rows, depth))
    if extreme:
        codes[:] = generator.choice([low, high], (features, 1))
        x[:] = generator.choice([-127, 127], (rows, 1))
    x[:, ::group] = 127  # so that the scale of each group is 1
    size = depth if bits == 8 else group
    scales_FG = torch.ones(features, -(-depth // size))
    weight = AffineWeight(torch.from_numpy(codes.astype(np.int8)), scales_FG, None, bits, size)
    actual = kernels().linear(torch.from_numpy(x).float(), PackedQuantizedWeight([weight])).numpy()
    expected = np.zeros_like(actual)
    for first in range(0, depth, group):
        expected += (x[:, first : first + group] @ codes[:, first : first + group].T).astype(np.float32)
    assert (actual == expected).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(scheme: Scheme, dtype: torch.dtype) -> None:
    packed = PackedQuantizedWeight([random_weight(70, 1600, scheme)])
    x_TE = torch.randn(210, 1600).to(dtype)
    together = kernels(dtype).linear(x_TE, packed)
    for rows in (1, 2, 5, 12, 13, 23, 64, 193):
        assert torch.equal(kernels(dtype).linear(x_TE[-rows:], packed), together[-rows:])


def test_zeros_tiny_values_infinities_and_nan() -> None:
    weight = random_weight(32, 128, scheme_named("int8"))
    packed = PackedQuantizedWeight([weight])
    x_TE = torch.randn(6, 128)
    x_TE[0], x_TE[1], x_TE[2, 5], x_TE[3, 7], x_TE[4] = 0, 1e-38, torch.inf, torch.nan, x_TE[4] * 1e30
    actual = kernels().linear(x_TE, packed)
    assert (actual[:2].abs() < 1e-30).all()
    assert not actual[2:4].isfinite().any()
    assert torch.allclose(actual[4], x_TE[4] @ weight.dequantized().T, rtol=0.1, atol=1e29)
    assert torch.equal(actual[5], kernels().linear(x_TE[5:], packed)[0])  # the others' neighbour is not touched


def test_no_rows() -> None:
    packed = PackedQuantizedWeight([random_weight(32, 64, GROUPED4)])
    assert kernels().linear(torch.empty(0, 64), packed).shape == (0, 32)
    assert kernels().embedding(torch.empty(0, dtype=torch.int64), packed).shape == (0, 64)


def test_rows_of_several_formats_are_one_weight() -> None:
    weights = [
        random_weight(features, 256, scheme, features)
        for features, scheme in (
            (40, GROUPED4),
            (8, GROUPED4),
            (33, GROUPED8),
            (5, scheme_named("int8")),
            (64, GROUPED4),
        )
    ]
    packed = PackedQuantizedWeight(weights)
    x_TE = torch.randn(3, 256)
    apart = [kernels().linear(x_TE, PackedQuantizedWeight([weight])) for weight in weights]
    assert torch.equal(kernels().linear(x_TE, packed), torch.cat(apart, 1))
    whole_FE = torch.cat([weight.dequantized() for weight in weights])
    ids_T = torch.tensor([0, 45, 50, 85, 149, 81])
    torch.testing.assert_close(kernels().embedding(ids_T, packed), whole_FE[ids_T], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_in_another_order_than_the_inputs(dtype: torch.dtype) -> None:
    """As if x were gathered first, to the bit. -1 is no input; two weights share an order, the third has its own."""
    generator = np.random.default_rng(0)
    weights, orders = [random_weight(features, 96, GROUPED4, features) for features in (40, 8, 33)], []
    for _ in range(2):
        order = np.full(96, -1)
        order[generator.permutation(96)[:70]] = generator.permutation(70)
        orders.append(order)
    of_weights = (orders[0], orders[0], orders[1])
    ordered = [
        replace(weight, order=InputOrder(torch.from_numpy(order), 70))
        for weight, order in zip(weights, of_weights, strict=True)
    ]
    x_TI = torch.randn(14, 70).to(dtype)
    apart = []
    for weight, order in zip(weights, of_weights, strict=True):
        gathered = np.where(order < 0, 0, x_TI.float().numpy()[:, order])
        x_TE = torch.from_numpy(gathered).to(dtype)
        apart.append(kernels(dtype).linear(x_TE, PackedQuantizedWeight([weight])))
    packed = PackedQuantizedWeight(ordered)
    assert (packed.depth, len(packed._structs)) == (70, 2)
    assert torch.equal(kernels(dtype).linear(x_TI, packed), torch.cat(apart, 1))
    assert torch.equal(kernels(dtype).linear(x_TI[3:4], packed), torch.cat(apart, 1)[3:4])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("depth", [13, 200])
def test_embedding(depth: int, scheme: Scheme) -> None:
    weight = random_weight(50, depth, scheme)
    ids_T = torch.tensor([49, 0, 31, 32, 0])
    rows_TE = kernels(torch.bfloat16).embedding(ids_T, PackedQuantizedWeight([weight]))
    torch.testing.assert_close(rows_TE, weight.dequantized()[ids_T].bfloat16(), rtol=0.01, atol=4e-3)


def test_scales_of_16_bits_are_kept_to_the_bit() -> None:
    """Also those that float16 could not hold, and small ones beside large ones."""
    codes_FE = torch.full((2, 64), 1, dtype=torch.int8)
    scales_FG = torch.tensor([[1e-20, 3e-24], [3e8, 1.2345]]).bfloat16().float()
    packed = PackedQuantizedWeight([AffineWeight(codes_FE, scales_FG, None, 4, 32)])
    rows_TE = kernels().embedding(torch.tensor([0, 1]), packed)
    assert torch.equal(rows_TE[:, ::32], scales_FG)


def test_what_can_not_be_multiplied_is_refused() -> None:
    codes = torch.zeros(4, 24, dtype=torch.int8)
    assert not can_pack(AffineWeight(codes, torch.ones(4, 4), None, 8, 6))
    assert not can_pack(quantize_rtn(torch.randn(4, 24), scheme_named("fp8")))
    with pytest.raises(QuantizationError, match="groups of 6"):
        PackedQuantizedWeight([AffineWeight(codes, torch.ones(4, 4), None, 8, 6)])
    with pytest.raises(QuantizationError, match="not 0 to 16"):
        PackedQuantizedWeight(
            [AffineWeight(codes + 16 * torch.eye(4, 24, dtype=torch.int8), torch.ones(4, 3), None, 4, 8)]
        )
    packed = PackedQuantizedWeight([AffineWeight(codes, torch.ones(4, 3), None, 8, 8)])
    with pytest.raises(KernelArgumentError, match="rows of 25"):
        kernels().linear(torch.empty(1, 25), packed)
    with pytest.raises(KernelArgumentError, match="float32"):
        kernels().linear(torch.empty(1, 24).bfloat16(), packed)
