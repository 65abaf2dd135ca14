"""GPUs by the figures of NVIDIA's data sheets: memory, bandwidth, and FLOPs without sparsity."""

from __future__ import annotations

from dataclasses import dataclass

GB, TFLOPS = 10**9, 10**12
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a value."""
KV_DTYPES = {**DTYPES, "int8": 1, "fp8": 1}
"""Likewise, of the KV cache."""


@dataclass(frozen=True)
class Gpu:
    """`memory`: bytes, by the decimal gigabytes of the data sheet. The driver shows some percent more or less."""

    name: str
    memory: int
    bandwidth: float | None
    """Bytes a second."""
    flops_16: float | None
    """A second: bfloat16 or float16 on tensor cores, sums in float32."""
    flops_32: float | None
    """float32 without tensor cores."""
    has_bfloat16: bool
    source: str
    has_float8: bool = True

    def flops(self, dtype: str) -> float | None:
        return self.flops_32 if dtype == "float32" else self.flops_16


def _gpu(
    name: str,
    gb: int,
    gb_per_second: int,
    tflops_16: float,
    tflops_32: float,
    sheet: str,
    has_bfloat16: bool = True,
    has_float8: bool = False,
) -> Gpu:
    speeds = gb_per_second * GB, tflops_16 * TFLOPS, tflops_32 * TFLOPS
    return Gpu(name, gb * GB, *speeds, has_bfloat16, f"NVIDIA {sheet} data sheet", has_float8)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("T4", 16, 300, 65, 8.1, "T4", has_bfloat16=False),
        _gpu("A10", 24, 600, 125, 31.2, "A10"),
        _gpu("A30", 24, 933, 165, 10.3, "A30"),
        _gpu("L4", 24, 300, 121, 30.3, "L4", has_float8=True),
        _gpu("A40", 48, 696, 149.7, 37.4, "A40"),
        _gpu("L40S", 48, 864, 362, 91.6, "L40S", has_float8=True),
        _gpu("A100-40GB", 40, 1555, 312, 19.5, "A100"),
        _gpu("A100-80GB", 80, 2039, 312, 19.5, "A100 (SXM)"),
        _gpu("H100-PCIE", 80, 2000, 756, 51, "H100 (PCIe)", has_float8=True),
        _gpu("H100-NVL", 94, 3900, 835, 60, "H100 (NVL)", has_float8=True),
        _gpu("H100", 80, 3350, 989, 67, "H100 (SXM)", has_float8=True),
        _gpu("H200", 141, 4800, 989, 67, "H200 (SXM)", has_float8=True),
        _gpu("B200", 180, 8000, 2250, 75, "HGX B200", has_float8=True),
    )
}


def find_gpu(name: str) -> Gpu | None:
    """In either case, with or without "NVIDIA"."""
    wanted = name.upper().removeprefix("NVIDIA").strip(" -_")
    return GPUS.get(wanted) or next((gpu for gpu in GPUS.values() if gpu.name.upper() == wanted), None)
