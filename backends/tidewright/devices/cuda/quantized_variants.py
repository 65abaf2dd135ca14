"""The kernels for quantized weights for compile_ahead.py: each as it is launched, for the shapes of real models."""

from __future__ import annotations

from collections.abc import Iterator

from tidewright.devices.cuda import quantized_kernels as kernels
from tidewright.devices.cuda.compile_ahead import Argument, Variant
from tidewright.devices.cuda.launch import Launch
from tidewright.devices.cuda.quantized_launch import (
    WeightLayout,
    layout_of,
    product_launch,
    quantize_launch,
    read_launch,
    sum_launch,
)

_ROWS = (1, 32, 64, 256)
_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_DEPTH = 4096
_FORMATS = {
    "int8": (8, _DEPTH, 0, False),
    "int8 g32": (8, 32, 0, False),
    "int8 g16": (8, 16, 0, False),
    "int4 g32": (4, 32, 8, False),
    "int4 g32 zeros": (4, 32, 0, True),
    "int4 g64 zeros": (4, 64, 0, True),
    "int4 g128": (4, 128, 8, False),
    "int4 g128 zeros": (4, 128, 0, True),
}
_TESTED = {("int4 g32 zeros", 1), ("int4 g64 zeros", 256)}


def variants() -> Iterator[Variant]:
    """Formats and rows in bf16, then what else changes the code: dtype, integer activations, splits."""
    for name in _FORMATS:
        for rows in _ROWS:
            yield _product(name, "bf16", rows, tested=(name, rows) in _TESTED)
    for dtype in ("fp16", "fp32"):
        for name in ("int8", "int4 g64 zeros", "int4 g128"):
            for rows in (1, 256):
                yield _product(name, dtype, rows)
    yield _product("int4 g32 zeros", "fp32", 1)
    for rows in _ROWS:
        yield _product("int8", "bf16", rows, is_integer=True, tested=rows == 1)
    yield _product("int8", "bf16", 1, splits=8)
    yield _product("int8", "bf16", 1, splits=8, is_integer=True)
    for dtype in _SIZES:
        yield _quantize(dtype, "i8", tested=dtype == "bf16")
        yield _quantize(dtype, "fp8e4nv")
        for name in ("int8", "int4 g64 zeros"):
            yield _read(name, dtype, tested=dtype == "bf16" and name != "int8")
    yield _sum("*fp32", 8, tested=True)
    yield _sum("*i32", 8)


def _layout(name: str) -> WeightLayout:
    bits, group, zero, has_offsets = _FORMATS[name]
    layout = layout_of(bits, group, _DEPTH, zero, group < _DEPTH, has_offsets)
    assert layout
    return layout


def _weight() -> dict[str, Argument]:
    halves = dict.fromkeys(("scales_GF", "offsets_GF"), "*fp16")
    return {"codes_FB": "*i8", **halves, "factors_F": "*fp32"}


def _product(
    name: str, dtype: str, rows: int, splits: int = 1, is_integer: bool = False, tested: bool = False
) -> Variant:
    numbers = {**dict.fromkeys(("rows", "group"), "i32"), **dict.fromkeys(("features", "depth"), "i32:16")}
    sums = "*i32" if is_integer else "*fp32"
    arguments = {
        "out": f"*{dtype}" if splits == 1 else sums,
        "x_TE": "*i8" if is_integer else f"*{dtype}",
        **_weight(),
        "token_scales_T": "*fp32",
        "bias_F": f"*{dtype}",
        **numbers,
        **dict.fromkeys(("stride_x", "stride_codes", "stride_out"), "i32:16"),
    }
    launch = _with_bias(product_launch(_layout(name), 1 if is_integer else _SIZES[dtype], rows, splits))
    tile = f"{launch.constants['F']}x{launch.constants['T']}"
    shape = f"{name}, {'w8a8' if is_integer else dtype}, {tile}" + f" {splits} splits" * (splits > 1)
    return Variant("quantized: product", shape, kernels.product_kernel, arguments, launch, tested)


def _sum(sums: str, splits: int, tested: bool = False) -> Variant:
    arguments = {
        "out_TF": "*bf16",
        "sums_STF": sums,
        "factors_F": "*fp32",
        "token_scales_T": "*fp32",
        "bias_F": "*bf16",
        **dict.fromkeys(("features", "stride_out"), "i32:16"),
    }
    launch = _with_bias(sum_launch(splits))
    return Variant("quantized: sum", f"{sums[1:]} {splits} splits", kernels.sum_kernel, arguments, launch, tested)


def _with_bias(launch: Launch) -> Launch:
    return launch._replace(constants=launch.constants | {"HAS_BIAS": True})


def _quantize(dtype: str, codes: str, tested: bool = False) -> Variant:
    arguments = {
        "x_TE": f"*{dtype}",
        "codes_TE": f"*{codes}",
        "scales_T": "*fp32",
        **dict.fromkeys(("size", "stride_x"), "i32:16"),
    }
    return Variant(
        "quantized: tokens",
        f"{dtype} to {codes}",
        kernels.quantize_kernel,
        arguments,
        quantize_launch(_DEPTH),
        tested=tested,
        least_arch=80 if codes == "i8" else 90,
    )


def _read(name: str, dtype: str, tested: bool) -> Variant:
    arguments = {
        "out_TE": f"*{dtype}",
        "ids_T": "*i64",
        **_weight(),
        **dict.fromkeys(("features", "depth", "stride_codes", "stride_out"), "i32:16"),
        "group": "i32",
    }
    launch = read_launch(_layout(name), _DEPTH)
    return Variant("quantized: read", f"{name}, {dtype}", kernels.read_kernel, arguments, launch, tested)
