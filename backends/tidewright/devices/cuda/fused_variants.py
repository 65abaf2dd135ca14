"""The kernels other than attention for compile_ahead.py: each as it is launched, for the shapes of real models."""

from __future__ import annotations

from collections.abc import Iterator

from tidewright.devices.cuda import activations, norms, rope_and_cache, sampling_kernels
from tidewright.devices.cuda.attention_launch import CODE_NAMES, FP8_CODES, INT8_CODES, PLAIN
from tidewright.devices.cuda.compile_ahead import Variant
from tidewright.devices.cuda.sampling_launch import COUNT_LAUNCH, Work, launches_of

_POINTERS_OF_A_ROW = {
    "temperature_B": "*fp32",
    "top_k_B": "*i64",
    "top_p_B": "*fp64",
    "min_p_B": "*fp32",
    "seeds_B": "*i64",
    "positions_B": "*i64",
    "repetition_B": "*fp64",
    "frequency_B": "*fp64",
    "presence_B": "*fp64",
    "count_rows_B": "*i32",
    "counts_NV": "*i32",
    "tokens_B": "*i64",
    "edges_B": "*fp32",
    "work_BV": "*fp32",
    "keys_BC": "*i32",
    "firsts_BC": "*i32",
    "blocks_BC": "*i32",
    "sums_BC": "*fp32",
    "scores_BC": "*fp32",
    "masses_BC": "*fp32",
}


def variants() -> Iterator[Variant]:
    for dtype in ("bf16", "fp16", "fp32"):
        for head_dim in (64, 80, 96, 128, 256):
            yield _rope(dtype, 32 + 2 * 8, head_dim, tested=head_dim == 80 and dtype == "bf16")
            for codes in (INT8_CODES, FP8_CODES):
                tested = (dtype, head_dim, codes) == ("bf16", 256, FP8_CODES)
                yield _rope(dtype, 32 + 2 * 8, head_dim, codes, tested)
        for size in (576, 2048, 4096, 8192):
            yield _norm(dtype, dtype, 256, size, is_added=True, tested=size == 8192 and dtype == "bf16")
        yield _norm(dtype, dtype, 256, 4096, is_added=False)
        yield _norm(dtype, dtype, 256 * 32, 128, is_added=False)  # of heads
        for is_gelu in (False, True):
            yield _activation(dtype, is_gelu, tested=is_gelu and dtype == "bf16")
        yield from _sampling(dtype, 151936, tested=dtype == "bf16")
    yield _norm("bf16", "fp32", 256, 3584, is_added=True)  # Gemma's
    yield _norm("bf16", "bf16", 256, 16384, is_added=True)
    yield from _sampling("bf16", 49152)


def _rope(dtype: str, heads: int, head_dim: int, codes: int = PLAIN, tested: bool = False) -> Variant:
    arguments = {
        "qkv_TXD": f"*{dtype}",
        "cos_PD": "*fp32",
        "sin_PD": "*fp32",
        "positions_T": "*i64",
        "slots_T": "*i64",
        "q_THD": f"*{dtype}",
        **dict.fromkeys(("k_cache", "v_cache"), f"*{dtype}" if codes == PLAIN else "*i8"),
        **dict.fromkeys(("k_scales", "v_scales"), f"*{dtype}" if codes == PLAIN else "*fp32"),
        "heads": "i32",
        "kv_heads": "i32",
        **dict.fromkeys(("stride_qkv", "stride_q", "stride_n", "stride_s", "stride_k", "stride_scales"), "i32:16"),
    }
    launch = rope_and_cache.launch_of(heads, head_dim, 16, codes)
    shape = f"{dtype} D{head_dim}{CODE_NAMES[codes]}"
    return Variant("rope and cache", shape, rope_and_cache.rotate_kernel, arguments, launch, tested=tested)


def _norm(dtype: str, weight: str, rows: int, size: int, is_added: bool, tested: bool = False) -> Variant:
    arguments = {
        "x": f"*{dtype}",
        "residual": f"*{dtype}",
        "weight_E": f"*{weight}",
        "out": f"*{dtype}",
        "rows": "i32",
        "heads": "i32",
        "stride_x": "i32:16",
        "stride_out": "i32:16",
        "eps": "fp32",
    }
    shape = f"{dtype}, {weight} weight, {size} values" + ", added" * is_added
    launch = norms.launch_of(rows, size, is_added)
    return Variant("rms norm", shape, norms.rms_norm_kernel, arguments, launch, tested=tested)


def _activation(dtype: str, is_gelu: bool, tested: bool = False) -> Variant:
    arguments = {"gate_up_TF2": f"*{dtype}", "out_TF": f"*{dtype}", "size": "i32:16", "stride": "i32:16"}
    shape = f"{dtype} {'gelu' if is_gelu else 'silu'}"
    launch = activations.launch_of(is_gelu)
    return Variant("activation", shape, activations.activate_kernel, arguments, launch, tested=tested)


def _sampling(dtype: str, vocab: int, tested: bool = False) -> Iterator[Variant]:
    """Each kernel with all its options: without them it is a part of that."""
    launches = launches_of(vocab, Work())
    types = _POINTERS_OF_A_ROW | {
        "logits_BV": f"*{dtype}",
        "vocab": "i32:16",
        "stride_logits": "i32:16",
        "chunks": "i32",
    }
    for name, launch in {**launches, "count": COUNT_LAUNCH}.items():
        if dtype != "bf16" and name != "penalise":
            continue  # only penalise reads the model's logits
        kernel = getattr(sampling_kernels, f"{name}_kernel")
        arguments = {argument: types[argument] for argument in kernel.arg_names if argument not in launch.constants}
        yield Variant(f"sampling: {name}", f"{dtype} V{vocab}", kernel, arguments, launch, tested=tested)
