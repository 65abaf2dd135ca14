"""What a processor or card gains from weights in few bits: for the choice of `auto`, and what is said of it.

Pure: what the device has comes in as arguments. No torch: the command line imports it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

INT8, INT4, FP8 = "int8", "int4", "fp8"
"""Kinds of codes."""
_LEAST_FLOAT8 = (8, 9)  # Ada; Hopper has it, too


@dataclass(frozen=True)
class Hardware:
    name: str
    """For messages."""
    gains: Mapping[str, float] = field(default_factory=dict)
    """By kind of codes that it multiplies as they are stored: tokens a second of one sequence, over those of 16 bits.

    0: not known. Other kinds are dequantized while they are loaded, or emulated.
    """
    is_measured: bool = False
    """Else gains are upper bounds, by the bytes of a weight."""

    def lacks(self, kind: str) -> bool:
        return kind not in self.gains

    def gain(self, kind: str) -> str:
        """Of a kind that it multiplies."""
        smaller = "a third of the memory" if kind == INT4 else "half the memory"
        if not (times := self.gains[kind]):
            return smaller
        return f"{smaller}, {'about' if self.is_measured else 'at most'} {times:g}x the speed"


# Decode of one sequence of SmolLM2-135M (docs/quantization.md). What other instructions gain is not known.
_VNNI = {INT8: 1.6, INT4: 2.1}
_UNKNOWN = {INT8: 0.0, INT4: 0.0}
_BY_INSTRUCTIONS: tuple[tuple[str, frozenset[str], Mapping[str, float]], ...] = (
    ("AVX-512 VNNI", frozenset({"avx512f", "avx512_vnni"}), _VNNI),
    ("AVX-VNNI", frozenset({"avx2", "avx_vnni"}), _UNKNOWN),
    ("AVX-512", frozenset({"avx512f"}), _UNKNOWN),
    ("AVX2", frozenset({"avx2"}), _UNKNOWN),
)


def of_processor(features: Collection[str], has_kernels: bool) -> Hardware:
    """`features` as /proc/cpuinfo names them; `has_kernels`: ours, for the type that the model computes in."""
    if not has_kernels:
        return Hardware("this processor without kernels for them")
    for name, needed, gains in _BY_INSTRUCTIONS:
        if needed <= set(features):
            return Hardware(f"this processor ({name})", gains, is_measured=True)
    return Hardware("this processor", _UNKNOWN, is_measured=True)


def of_card(name: str, has_float8: bool) -> Hardware:
    gains = {INT8: 2.0, INT4: 3.5}  # of 16 bits: 8.05 and 4.5
    return Hardware(name, gains | {FP8: 2.0} if has_float8 else gains)


def multiplies_float8(capability: tuple[int, int]) -> bool:
    """Of a card with this compute capability."""
    return capability >= _LEAST_FLOAT8


def advice(hardware: Hardware, stored: str = "") -> str:
    """For plain weights; `stored`: the kind that the checkpoint has beside them."""
    kind = stored if stored in hardware.gains else INT8
    if hardware.lacks(kind):
        return f"{hardware.name} would only emulate fewer bits, which saves nothing"
    option = "stored" if kind == stored else kind
    return f"--quantization {option} would take {hardware.gain(kind)} on {hardware.name}"


def on(hardware: Hardware, kind: str) -> str:
    """How weights of this kind are multiplied."""
    if not hardware.lacks(kind):
        return f"multiplied as they are by {hardware.name}"
    instead = "" if hardware.lacks(INT8) else f"; int8 would take {hardware.gain(INT8)}"
    return f"{hardware.name} does not multiply {kind}, so they take 16 bits once they are loaded{instead}"


def summary(hardware: Hardware) -> str:
    """All kinds, for a look at a machine."""
    if not hardware.gains:
        return f"{hardware.name}: weights in fewer bits are emulated, which saves nothing"
    multiplied = "; ".join(f"{kind}: {hardware.gain(kind)}" for kind in hardware.gains)
    lacking = [kind for kind in (INT8, INT4, FP8) if hardware.lacks(kind)]
    return f"{hardware.name}: {multiplied}" + (f"; {', '.join(lacking)}: dequantized" if lacking else "")
