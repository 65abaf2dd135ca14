"""Tiles and splits of the attention kernels, chosen from shapes and host-side bounds alone."""

from __future__ import annotations

from dataclasses import dataclass

from tidewright.devices.cuda.launch import Launch, power_of_two

PLAIN, INT8_CODES, FP8_CODES = 0, 1, 2
"""Of a cache: numbers, or codes of kv_cache/quantized.py."""
CODE_NAMES = ("", ", int8 cache", ", fp8 cache")
HEAD_SIZES = (64, 80, 96, 128, 256)  # tested and compiled
MIN_SPLIT = 256  # tokens; less is not worth a program of its own and the combination
MAX_SPLITS = 64
_LEAST_ROWS = 16  # of a tensor core's product


@dataclass(frozen=True)
class AttentionShape:
    """What is compiled into a layer's attention kernels. `itemsize`: bytes of a number in products, that is of q."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    itemsize: int
    has_window: bool = False
    has_softcap: bool = False
    codes: int = PLAIN  # what the cache holds

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def constants(self) -> dict[str, int]:
        return {
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "D": max(16, power_of_two(self.head_dim)),
            "BLOCK_SIZE": self.block_size,
            "HAS_WINDOW": self.has_window,
            "HAS_SOFTCAP": self.has_softcap,
            "CODES": self.codes,
        }

    @property
    def is_unpacked(self) -> bool:
        """Codes become float32, which takes four times their registers."""
        return self.codes != PLAIN and self.itemsize == 4

    @property
    def row_bytes(self) -> int:
        return power_of_two(self.head_dim) * self.itemsize


def decode_launch(shape: AttentionShape, splits: int) -> Launch:
    rows = max(_LEAST_ROWS, power_of_two(shape.group))
    # What becomes of codes takes registers, too.
    tile = 16 if shape.codes != PLAIN and shape.head_dim > 128 else _tile(shape)
    constants = {**shape.constants, "M": rows, "TILE": tile, "SPLITS": splits, "MIN_SPLIT": MIN_SPLIT}
    return Launch(constants, warps=8 if shape.is_unpacked else 4, stages=_stages(shape, 3))


def combine_launch(shape: AttentionShape, splits: int) -> Launch:
    constants = {"HEAD_DIM": shape.head_dim, "D": shape.constants["D"], "SPLITS": splits}
    return Launch(constants, warps=4 if splits * shape.head_dim <= 4096 else 8, stages=1)


def prefill_launch(shape: AttentionShape, max_query: int) -> Launch:
    """`max_query`: most new tokens of one sequence; small ones get a small tile."""
    rows = max(_LEAST_ROWS, power_of_two(min(max_query * shape.group, _most_rows(shape))), power_of_two(shape.group))
    constants = {**shape.constants, "M": rows, "TILE": _tile(shape)}
    is_large = rows > 64 or rows * shape.row_bytes > 64 * 256
    is_large |= shape.codes != PLAIN and (rows == 64 or shape.head_dim > 64)
    return Launch(constants, warps=8 if is_large else 4, stages=_stages(shape, 2))


def _stages(shape: AttentionShape, most: int) -> int:
    if shape.is_unpacked:
        return 1
    return 2 if shape.itemsize == 4 else most


def _tile(shape: AttentionShape) -> int:
    """Tokens of the context per iteration: as many as do not spill.

    Float32 is multiplied without tensor cores, and such a product keeps its operands in registers.
    """
    if shape.itemsize == 4:
        return 16
    return 64 if shape.head_dim <= 128 else 32


def _most_rows(shape: AttentionShape) -> int:
    if shape.itemsize == 4:
        return 16 if shape.is_unpacked else 32
    if shape.codes != PLAIN:
        return 64
    return 128 if shape.head_dim <= 128 else 64


def count_splits(kv_heads: int, max_context: int, processors: int) -> int:
    """A power of two, enough for one sequence alone to occupy about all of the device's `processors`.

    `max_context` bounds the contexts of a step. It changes no result: a sequence's length decides how many splits it
    uses, and any bound above that length allows it that many.
    """
    wanted = min(power_of_two(-(-processors // kv_heads)), MAX_SPLITS)
    return min(wanted, power_of_two(-(-max_context // MIN_SPLIT)))


def count_prefill_tiles(launch: Launch, tokens: int, sequences: int) -> int:
    """Programs per KV head, enough however the tokens are spread over the sequences."""
    return tokens // (launch.constants["M"] // launch.constants["GROUP"]) + sequences
