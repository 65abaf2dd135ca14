"""How a rank's share of a group in the order of activations is cut into parts. No torch: `tidewright plan` reads it."""

from __future__ import annotations

PARTS = (16, 32, 64, 128)
"""Inputs of a part: sizes that all devices' kernels take."""
_SCALE_BITS = 32  # of a scale and an offset


def part_sizes(group: int) -> list[int]:
    """Those that a group of so many inputs can be cut into."""
    return [part for part in PARTS if part <= group] or [group]


def part_bits(part: int, bits: int) -> int:
    """That a part of so many weights of an output takes."""
    return part * bits + _SCALE_BITS
