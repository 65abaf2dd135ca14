"""The kernels of LoRA for compile_ahead.py."""

from __future__ import annotations

from collections.abc import Iterator

from tidewright.devices.cuda import lora_kernels
from tidewright.devices.cuda.compile_ahead import Variant


def variants() -> Iterator[Variant]:
    for dtype in ("bf16", "fp16", "fp32"):
        common = {"rows_N": "*i32", "tiles_M3": "*i32", "ranks_SP": "*i32", "parts": "i32", "most_rank": "i32:16"}
        shrink = {
            "x_TE": f"*{dtype}",
            "h_NPR": "*fp32",
            "a_SPRE": f"*{dtype}",
            "scales_SP": "*fp32",
            "size": "i32:16",
            "stride_x": "i32:16",
        }
        expand = {
            "h_NPR": "*fp32",
            "y_TF": f"*{dtype}",
            "b_SRF": f"*{dtype}",
            "ends_P": "*i32",
            "features": "i32:16",
            "stride_y": "i32:16",
        }
        tested = dtype == "bf16"
        yield Variant(
            "lora: shrink", dtype, lora_kernels.shrink_kernel, common | shrink, lora_kernels.SHRINK, tested=tested
        )
        yield Variant(
            "lora: expand", dtype, lora_kernels.expand_kernel, common | expand, lora_kernels.EXPAND, tested=tested
        )
