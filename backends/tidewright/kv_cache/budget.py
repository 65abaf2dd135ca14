"""How much memory the KV cache may take, and what that holds. Pure: settings and `tidewright plan` need no torch."""

from __future__ import annotations

import re

# What "auto" stands for: without a GPU others want the memory as well. On one, what the largest step takes is measured
# and comes off; the rest is for what no measurement sees, such as fragments.
AUTO_CPU, AUTO_GPU = "1GiB", "90%"
SCALE_BYTES = 4
"""Of a key or value in codes of one byte (kv_cache/quantized.py)."""
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_memory(text: str, free: int) -> int:
    """Bytes meant by "1GiB", "512 MB" or "80%" (of `free` bytes).

    Raises:
        ValueError: the text is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else "?"
    if match and unit == "%" and 0 < float(match[1]) <= 100:
        return int(free * float(match[1]) / 100)
    if not match or unit not in _UNITS:
        raise ValueError(f"{text!r} is not an amount of memory; write e.g. 1GiB, 512MiB or 80%")
    return int(float(match[1]) * _UNITS[unit])


def is_share(text: str) -> bool:
    """Of the free memory, as "80%"."""
    return text.rstrip().endswith("%")


def part_of(text: str, share: float) -> str:
    """`share` (0 to 1) of an amount, or of a share of the free memory, as `parse_memory` reads it."""
    if is_share(text):
        return f"{float(text.rstrip()[:-1]) * share:g}%"
    return f"{int(parse_memory(text, 0) * share)}B"


def mib(count: int) -> str:
    """Bytes, for messages."""
    return f"{count / 2**20:.1f} MiB"


def bytes_per_block(
    num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, value_bytes: int, scale_bytes: int = 0
) -> int:
    """Keys and values of `block_size` tokens, in all layers, of one rank's KV heads. A scale is that of one vector."""
    return 2 * num_layers * num_kv_heads * block_size * (head_dim * value_bytes + scale_bytes)


def blocks_of(tokens: int, block_size: int) -> int:
    """A sequence of so many tokens takes whole blocks."""
    return -(-tokens // block_size)
