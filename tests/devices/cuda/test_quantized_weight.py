"""devices/cuda/quantized_weight.py, interpreted on the CPU, against numpy in float64 and in integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.interpreted import interpreted, rounding_of
from tidewright.quantization.affine import SCHEMES, AffineWeight, QuantizationError, Scheme, quantize_rtn

with interpreted():
    from tidewright.devices.cuda import quantized_weight
    from tidewright.devices.cuda.quantized_weight import CudaQuantizedWeight, layout_for, pack, quantize_tokens

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
SYMMETRIC = {size: Scheme("", 4, size) for size in (16, 32, 64, 128)}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(weight: AffineWeight) -> np.ndarray:
    """[F, E] in float64, with the scales and offsets of groups in the 11 bits of float16."""
    layout = layout_for(weight)
    assert layout
    groups = np.arange(weight.codes_FE.shape[1]) // weight.group_size
    scales, offsets = (
        np.zeros((len(weight.codes_FE), 1)) if values is None else values.double().numpy()
        for values in (weight.scales_FG, weight.offsets_FG)
    )
    if layout.has_scales:
        scales, offsets = _in_11_bits(scales), _in_11_bits(offsets)
    return weight.codes_FE.numpy() * scales[:, groups] + offsets[:, groups % offsets.shape[1]]


def _in_11_bits(values: np.ndarray) -> np.ndarray:
    mantissas, exponents = np.frexp(values)
    return np.ldexp(np.round(mantissas * 2**11) / 2**11, exponents)


def assert_close(found: torch.Tensor, x: torch.Tensor, weight_FE: np.ndarray, is_rounded: bool = False) -> None:
    """Up to one rounding of the result, float32 sums, and, if `is_rounded`, one rounding of each weight."""
    values = x.double().numpy()
    expected = torch.from_numpy(values @ weight_FE.T)
    sizes = torch.from_numpy(np.abs(values) @ np.abs(weight_FE).T)
    allowed = expected.abs() * rounding_of(found.dtype) + sizes * (2e-6 + rounding_of(found.dtype) * is_rounded)
    assert bool(((found.double() - expected).abs() <= allowed + 1e-30).all())


@pytest.mark.parametrize(
    ("scheme", "features", "depth", "rows", "dtype"),
    [
        (SCHEMES["int8"], 70, 131, 1, BF16),
        (SCHEMES["int8"], 130, 64, 70, FP16),
        (SCHEMES["int8"], 33, 200, 17, FP32),
        (Scheme("", 8, 32), 40, 100, 3, BF16),
        (Scheme("", 8, 16), 65, 48, 33, FP16),
        (Scheme("", 8, 0, symmetric=False), 24, 131, 2, FP32),
        (SCHEMES["int4-g32"], 70, 96, 1, BF16),
        (SCHEMES["int4-g64"], 20, 200, 5, FP16),
        (SCHEMES["int4-g128"], 33, 256, 2, FP32),
        (SCHEMES["int4-g128"], 70, 130, 65, BF16),
        (SYMMETRIC[16], 30, 90, 40, FP32),
        (SYMMETRIC[64], 9, 131, 3, BF16),
        (SYMMETRIC[128], 129, 256, 129, FP16),
        (Scheme("", 4, 0), 17, 77, 2, FP32),
    ],
)
def test_products_and_rows(scheme: Scheme, features: int, depth: int, rows: int, dtype: torch.dtype) -> None:
    weight = quantize_rtn(random(features, depth), scheme)
    packed, wanted_FE = pack(weight, CPU), exact(weight)
    x, bias = random(rows, depth, seed=1).to(dtype), random(features, seed=2).to(dtype)
    wide = torch.full((rows, features + 7), 5.0, dtype=dtype)
    found = packed.multiply(x, out_TF=wide[:, 3:-4])
    is_rounded = packed.layout.has_scales and rows > 32
    assert_close(found, x, wanted_FE, is_rounded)
    assert bool((wide[:, :3] == 5).all())
    assert bool((wide[:, -4:] == 5).all())
    added = packed.multiply(x, bias)
    torch.testing.assert_close(
        added.double(), found.double() + bias.double(), rtol=2 * rounding_of(dtype), atol=8 * rounding_of(dtype)
    )
    ids = torch.tensor([features - 1, 0, features, -1])
    read = packed.read_rows(ids, torch.full((4, depth), 5.0, dtype=dtype))
    torch.testing.assert_close(
        read[:2].double(), torch.from_numpy(wanted_FE[[-1, 0]]), rtol=rounding_of(dtype) + 1e-7, atol=1e-7
    )
    assert bool((read[2:] == 5).all())


def test_nothing_is_read_or_written_for_no_rows() -> None:
    packed = pack(quantize_rtn(random(20, 64), SCHEMES["int8"]), CPU)
    assert packed.multiply(torch.ones(0, 64)).shape == (0, 20)
    assert packed.read_rows(torch.empty(0, dtype=torch.int64), torch.empty(0, 64)).shape == (0, 64)
    assert quantize_tokens(torch.ones(0, 64)).codes_TE.shape == (0, 64)


def in_integers(packed: CudaQuantizedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.empty(len(x), packed.features, dtype=x.dtype)
    return packed.multiply_quantized(quantize_tokens(x), bias, out)


@pytest.mark.parametrize(
    ("features", "depth", "rows", "dtype", "processors"),
    [(70, 131, 1, FP32, 1), (33, 1100, 3, BF16, 1), (33, 1100, 3, BF16, 100), (66, 96, 35, FP16, 1)],
)
def test_sums_of_integers_are_exact(
    features: int, depth: int, rows: int, dtype: torch.dtype, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_weight, "_processors", lambda device: processors)
    weight = quantize_rtn(random(features, depth), SCHEMES["w8a8"])
    weight.codes_FE[0], weight.codes_FE[1] = 127, -128
    x = random(rows, depth, seed=1).to(dtype)
    x[0] = 3  # all of the largest code
    tokens = quantize_tokens(x)
    values = x.float().numpy()
    scales = np.abs(values).max(1) / np.float32(127)
    codes = np.round(values / scales[:, None]).astype(np.int64)
    assert np.array_equal(tokens.codes_TE.numpy(), codes)
    assert np.array_equal(tokens.scales_T.numpy(), scales)
    sums = (codes @ weight.codes_FE.numpy().astype(np.int64).T).astype(np.float32)
    wanted = torch.from_numpy(sums * weight.scales_FG[:, 0].numpy() * scales[:, None])
    found = in_integers(pack(weight, CPU), x)
    assert torch.equal(found, wanted.to(dtype))
    bias = random(features, seed=2).to(dtype)
    assert torch.equal(in_integers(pack(weight, CPU), x, bias), (wanted + bias.float()).to(dtype))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_tokens_of_extreme_values() -> None:
    x = torch.tensor(
        [[0.0] * 4, [1e-35, -1e-35, 0, 5e-36], [3e38, -3e38, 1, 1.5e38], [1, 2, torch.nan, 3], [1, -torch.inf, 2, 3]]
    )
    tokens = quantize_tokens(x)
    assert tokens.codes_TE[:3].tolist() == [[0] * 4, [127, -127, 0, 64], [127, -127, 0, 64]]
    assert tokens.scales_T[0] == 1
    assert bool(tokens.scales_T[3:].isinf().all())
    weight = quantize_rtn(random(3, 4), SCHEMES["w8a8"])
    packed = pack(weight, CPU)
    assert bool((in_integers(packed, x)[0] == 0).all())
    assert not bool(in_integers(packed, x)[3:].isfinite().any())


def test_tokens_in_float8() -> None:
    x = torch.cat([50 * random(3, 1100), random(1, 1100).bfloat16().float(), torch.zeros(1, 1100)])
    tokens = quantize_tokens(x, torch.float8_e4m3fn)
    scales = torch.where(x.abs().amax(1) > 0, x.abs().amax(1) / 448, 1.0)
    assert torch.equal(tokens.scales_T, scales)
    wanted = (x / scales[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(tokens.codes_TE.float(), wanted.float())


def test_splits_of_the_inputs_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias = random(2, 1100, seed=1).half(), random(20, seed=2).half()
    for scheme in (SCHEMES["int8"], SCHEMES["int4-g64"]):
        weight = quantize_rtn(random(20, 1100), scheme)
        packed = pack(weight, CPU)
        monkeypatch.setattr(quantized_weight, "_processors", lambda device: 1)
        whole = packed.multiply(x, bias)
        monkeypatch.setattr(quantized_weight, "_processors", lambda device: 100)
        torch.testing.assert_close(packed.multiply(x, bias), whole, rtol=1e-3, atol=1e-3)
        assert_close(packed.multiply(x), x, exact(weight))


def test_scales_far_apart_and_of_nothing_keep_their_bits() -> None:
    """Scales of a checkpoint in bfloat16 have 8 bits, and whatever size."""
    codes = torch.randint(-8, 8, (6, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scales = torch.tensor([[3e-30, 1e-30, 2e-31], [1e20, 3e17, 2e18], [0, 0, 0], [1, 0, 2**-12], [1, 2, 3], [7, 7, 7]])
    weight = AffineWeight(codes, scales.bfloat16().float(), None, 4, 32)
    packed = pack(weight, CPU)
    rows = packed.read_rows(torch.arange(6), torch.empty(6, 96))
    assert torch.equal(rows, weight.dequantized())


def test_four_bits_take_half_a_byte() -> None:
    weight = quantize_rtn(random(64, 1024), SCHEMES["int4-g64"])
    assert pack(weight, CPU).nbytes == 64 * (1024 // 2 + 1024 // 64 * (2 + 2) + 4)


def test_what_no_kernel_takes_is_known_before() -> None:
    for scheme in (Scheme("", 8, 24), Scheme("", 4, 8), SCHEMES["fp8"]):
        weight = quantize_rtn(random(4, 96), scheme)
        assert layout_for(weight) is None
        with pytest.raises(QuantizationError, match="no kernel takes"):
            pack(weight, CPU)
    with pytest.raises(QuantizationError, match="codes of 4 bits are -8 to 7 or 0 to 15"):
        pack(AffineWeight(torch.full((2, 32), 16, dtype=torch.int8), torch.ones(2, 1), None, 4, 32), CPU)
