"""The attention kernels for compile_ahead.py, launched as paged_attention.py does, for the shapes of real models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tidewright.devices.cuda import attention_kernels as kernels
from tidewright.devices.cuda.attention_launch import (
    CODE_NAMES,
    FP8_CODES,
    INT8_CODES,
    PLAIN,
    AttentionShape,
    combine_launch,
    decode_launch,
    prefill_launch,
)
from tidewright.devices.cuda.compile_ahead import Variant

_DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
_STRIDES = {"stride_out": "i32:16", "stride_q": "i32:16"}
_CACHE_STRIDES = {"stride_n": "i32:16", "stride_s": "i32:16", "stride_k": "i32:16", "stride_scales": "i32:16"}
_NUMBERS = {"scale": "fp32", "window": "i32", "softcap": "fp32"}


def variants() -> Iterator[Variant]:
    """All head sizes in bf16, then what else changes the code: group, block size, dtype, window, few rows."""
    for head_dim in (64, 80, 96, 128, 256):
        shape = AttentionShape(32, 8, head_dim, 16, 2)
        yield from _of_shape(shape, "bf16", splits=16, tested=("prefill",) if head_dim == 80 else ())
    llama = AttentionShape(32, 8, 128, 16, 2)
    yield from _of_shape(llama, "fp16", splits=16)
    yield _prefill(llama, "bf16", max_query=4)  # speculation, short ends of prompts
    yield _decode(llama, "bf16", splits=1)
    yield from _of_shape(AttentionShape(32, 8, 128, 32, 2), "bf16", splits=16)
    yield from _of_shape(AttentionShape(9, 3, 64, 16, 2), "bf16", splits=64)  # SmolLM2
    yield from _of_shape(AttentionShape(32, 32, 128, 16, 2), "bf16", splits=8)  # no group
    yield from _of_shape(AttentionShape(64, 8, 128, 16, 2), "bf16", splits=16)
    yield from _of_shape(AttentionShape(8, 1, 128, 16, 2), "bf16", splits=64)  # a rank of eight
    gemma = AttentionShape(8, 4, 256, 16, 2, has_window=True, has_softcap=True)
    yield from _of_shape(gemma, "bf16", splits=32, tested=("decode", "combine"))
    for head_dim in (64, 128, 256):
        yield from _of_shape(
            AttentionShape(32, 8, head_dim, 16, 4), "fp32", splits=16, tested=("prefill",) if head_dim == 64 else ()
        )
    yield from _quantized()


def _quantized() -> Iterator[Variant]:
    """Caches of codes: all head sizes, what else changes the code, and a window with a softcap."""
    for codes in (INT8_CODES, FP8_CODES):
        for head_dim in (64, 80, 96, 128, 256):
            shape = AttentionShape(32, 8, head_dim, 16, 2, codes=codes)
            tested = ("decode",) if head_dim == 256 and codes == FP8_CODES else ()
            yield from _of_shape(shape, "bf16", splits=16, tested=tested)
            yield from _of_shape(AttentionShape(32, 8, head_dim, 16, 4, codes=codes), "fp32", splits=16)
        llama = AttentionShape(32, 8, 128, 16, 2, codes=codes)
        yield from _of_shape(llama, "fp16", splits=16, tested=("prefill",) if codes == INT8_CODES else ())
        yield _prefill(llama, "bf16", max_query=4)
        yield _decode(llama, "bf16", splits=1)
        yield from _of_shape(AttentionShape(9, 3, 64, 16, 2, codes=codes), "bf16", splits=64)
        gemma = AttentionShape(8, 4, 256, 16, 2, has_window=True, has_softcap=True, codes=codes)
        yield from _of_shape(gemma, "bf16", splits=32)


def _of_shape(shape: AttentionShape, dtype: str, splits: int, tested: Sequence[str] = ()) -> Iterator[Variant]:
    yield _decode(shape, dtype, splits, "decode" in tested)
    yield _combine(shape, dtype, splits, "combine" in tested)
    yield _prefill(shape, dtype, 1024, "prefill" in tested)


def _decode(shape: AttentionShape, dtype: str, splits: int, tested: bool = False) -> Variant:
    pointers = {
        "out_BHD": f"*{dtype}",
        "split_values": "*fp32" if splits > 1 else f"*{dtype}",
        "split_sums": "*fp32" if splits > 1 else f"*{dtype}",
        "q_BHD": f"*{dtype}",
        **_cache_of(shape, dtype),
        "tables_PM": "*i32",
        "spans_B4": "*i32",
        "lengths_B": "*i32",
    }
    arguments = pointers | _STRIDES | _CACHE_STRIDES | _NUMBERS
    launch = decode_launch(shape, splits)
    return Variant(
        "attention: decode", f"{_named(shape, dtype)} {splits} splits", kernels.decode_kernel, arguments, launch, tested
    )


def _combine(shape: AttentionShape, dtype: str, splits: int, tested: bool = False) -> Variant:
    arguments = {"out_BHD": f"*{dtype}", "split_values": "*fp32", "split_sums": "*fp32", "stride_out": "i32:16"}
    name = f"{dtype} D{shape.head_dim} {splits} splits"
    launch = combine_launch(shape, splits)
    return Variant("attention: combine", name, kernels.combine_kernel, arguments, launch, tested)


def _prefill(shape: AttentionShape, dtype: str, max_query: int, tested: bool = False) -> Variant:
    pointers = {
        "out_THD": f"*{dtype}",
        "q_THD": f"*{dtype}",
        **_cache_of(shape, dtype),
        "tables_PM": "*i32",
        "spans_B4": "*i32",
    }
    arguments = pointers | {"num_sequences": "i32"} | _STRIDES | _CACHE_STRIDES | _NUMBERS
    launch = prefill_launch(shape, max_query)
    name = f"{_named(shape, dtype)} {launch.constants['M']} rows"
    return Variant("attention: prefill", name, kernels.prefill_kernel, arguments, launch, tested)


def _cache_of(shape: AttentionShape, dtype: str) -> dict[str, str]:
    caches, scales = (f"*{dtype}", f"*{dtype}") if shape.codes == PLAIN else ("*i8", "*fp32")
    return {"k_cache": caches, "v_cache": caches, "k_scales": scales, "v_scales": scales}


def _named(shape: AttentionShape, dtype: str) -> str:
    extras = [" window" * shape.has_window, " softcap" * shape.has_softcap, CODE_NAMES[shape.codes]]
    return f"{dtype} {shape.heads}/{shape.kv_heads} D{shape.head_dim} S{shape.block_size}" + "".join(extras)
