"""The processors that kernels are built for ahead of time, and which of those builds a processor can run.

An image has no compiler, so the kernels are built with it, once for each baseline. Pure: the processor is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    machine: str
    """As uname names the architecture."""
    vendor: str
    features: frozenset[str]
    """As /proc/cpuinfo names them."""


@dataclass(frozen=True)
class Baseline:
    """A build of the kernels, and what a processor must have to run it."""

    name: str
    machine: str
    flags: tuple[str, ...]
    """Of the compiler: the instructions that it may use."""
    features: frozenset[str] = frozenset()
    vendor: str = ""
    """Whose processors are fast with it; empty: anyone's."""

    def runs_on(self, processor: Processor) -> bool:
        return self.machine == processor.machine and self.features <= processor.features


AMD = "AuthenticAMD"
FAST_BF16_DOT = "-DFAST_BF16_DOT"
"""By vendor, not measured: AMD's cores multiply bfloat16 at full rate wherever they can, see vectors.h."""
# The microarchitecture levels of the x86-64 ABI. /proc/cpuinfo calls LZCNT abm.
_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_V4_FLAGS = ("-march=x86-64-v4",)
_VNNI = ("-mavx512vnni",)  # dot products of 8-bit integers
BASELINES = (
    Baseline(
        "x86-64-v4-amx",
        "x86_64",
        (*_V4_FLAGS, *_VNNI, "-mamx-tile", "-mamx-bf16"),
        _V4 | {"avx512_vnni", "amx_tile", "amx_bf16"},
    ),
    Baseline(
        "x86-64-v4-bf16",
        "x86_64",
        (*_V4_FLAGS, *_VNNI, "-mavx512bf16", FAST_BF16_DOT),
        _V4 | {"avx512_vnni", "avx512_bf16"},
        vendor=AMD,
    ),
    Baseline("x86-64-v4-vnni", "x86_64", (*_V4_FLAGS, *_VNNI), _V4 | {"avx512_vnni"}),
    Baseline("x86-64-v4", "x86_64", _V4_FLAGS, _V4),
    Baseline("x86-64-v3-vnni", "x86_64", ("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avx_vnni"}),
    Baseline("x86-64-v3", "x86_64", ("-march=x86-64-v3",), _V3),
    Baseline("armv8-a", "aarch64", ("-march=armv8-a",)),
)
"""The fastest first."""


def for_machine(machine: str) -> list[Baseline]:
    """Those that can be built on an architecture."""
    return [baseline for baseline in BASELINES if baseline.machine == machine]


def fitting(processor: Processor) -> list[Baseline]:
    """Those that are meant for a processor, the fastest first."""
    return [one for one in BASELINES if one.runs_on(processor) and one.vendor in ("", processor.vendor)]
