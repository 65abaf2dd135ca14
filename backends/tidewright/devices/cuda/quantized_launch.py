"""Tiles and splits of the kernels for quantized weights, chosen from shapes alone. No torch, no Triton, no device."""

from __future__ import annotations

from dataclasses import dataclass

from tidewright.devices.cuda.launch import Launch, power_of_two

PLANES = (64, 32, 16)
"""Inputs of one dot product, at most; all of them share their scale. Tensor cores take 16 at least."""
MAX_SPLITS = 16
TOKEN_TILES = (16, 32, 64, 128)
"""Rows of a tile; each is another kernel."""
_FEATURES = 64  # of a tile, for few rows
_FEW_ROWS = 32
_PROGRAMS = 2  # for each processor: fewer do not keep enough of the memory's requests in flight
_MIN_SPLIT = 512  # inputs; less is not worth a program of its own and the sum


@dataclass(frozen=True)
class WeightLayout:
    """How the codes of a weight lie in memory, and what is beside them."""

    bits: int
    plane: int
    """With 4 bits, a byte has the codes of two inputs which lie so far apart: see quantized_weight.py."""
    zero: int = 0
    """What is to be subtracted from a stored code."""
    has_scales: bool = False
    """Groups of inputs have scales; without, only features do."""
    has_offsets: bool = False

    @property
    def block(self) -> int:
        """Inputs in `plane` bytes."""
        return self.plane * 8 // self.bits

    @property
    def constants(self) -> dict[str, int]:
        return {
            "BITS": self.bits,
            "PLANE": self.plane,
            "ZERO": self.zero,
            "HAS_SCALES": self.has_scales,
            "HAS_OFFSETS": self.has_offsets,
        }


def layout_of(
    bits: int, group: int, depth: int, zero: int = 0, has_scales: bool = False, has_offsets: bool = False
) -> WeightLayout | None:
    """`group`: inputs that share a scale. None: groups have a size that no tile takes."""
    fitting = [plane for plane in PLANES if group >= depth or group % plane == 0]
    if not fitting:
        return None
    large = [plane for plane in fitting if plane >= 32] or fitting  # integers are multiplied 32 at a time
    # As large as rows don't have to be filled up for, where there is one.
    plane = next((plane for plane in large if depth % (plane * 8 // bits) == 0), large[-1])
    return WeightLayout(bits, plane, zero, has_scales, has_offsets)


def product_launch(layout: WeightLayout, itemsize: int, rows: int, splits: int) -> Launch:
    """`itemsize`: bytes of an activation."""
    columns, warps, stages = layout.plane, 4, 4  # `row_bytes`: what an iteration loads from each row
    if itemsize == 4:  # multiplied without tensor cores: such a product keeps its operands in registers
        features, tokens, columns, row_bytes, stages = 32, 16, min(columns, 16), 0, 2
    elif rows <= _FEW_ROWS:
        features, tokens = _FEATURES, 16 if rows <= 16 else 32
        row_bytes = max(64, 2 * columns) if layout.has_scales else 128  # as many as do not spill
    elif rows <= 64:
        features, tokens, row_bytes, stages = _FEATURES, 64, 64, 3
    else:
        features, tokens, row_bytes, warps, stages = 128, 128, 64, 8, 3
    constants = {
        **layout.constants,
        "F": features,
        "T": tokens,
        "J": columns,
        "UNROLL": max(1, row_bytes // columns),
        # Scaling the product costs more than scaling the weights once there are as many rows as inputs of a plane.
        "SCALES_FIRST": layout.has_scales and tokens > _FEW_ROWS,
        "SPLITS": splits,
    }
    # Results of integers are the same to the bit, whichever kernel scales the sums.
    return Launch(constants, warps, stages, fuses=itemsize != 1)


def sum_launch(splits: int) -> Launch:
    return Launch({"F": 512, "SPLITS": splits}, warps=4, stages=1, fuses=False)


def count_splits(features: int, depth: int, rows: int, processors: int) -> int:
    """Programs that share the inputs of a tile of outputs: a power of two, enough to occupy the device."""
    if rows > _FEW_ROWS:
        return 1
    tiles = -(-features // _FEATURES)
    wanted = power_of_two(-(-_PROGRAMS * processors // tiles))
    return min(wanted, MAX_SPLITS, power_of_two(max(1, depth // _MIN_SPLIT)))


def quantize_launch(size: int) -> Launch:
    """A program has one token."""
    return Launch({"TILE": min(4096, power_of_two(size))}, warps=4, stages=1, fuses=False)


def read_launch(layout: WeightLayout, depth: int) -> Launch:
    return Launch({**layout.constants, "TILE": min(1024, power_of_two(depth))}, warps=4, stages=1)
