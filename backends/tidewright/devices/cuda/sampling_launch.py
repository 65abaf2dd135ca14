"""How the sampling kernels are launched, and numbers that they share with the host. No Triton."""

from __future__ import annotations

from typing import NamedTuple

from tidewright.devices.cuda.launch import Launch, power_of_two
from tidewright.sampling.truncation import BLOCK

CHUNK = 64 * BLOCK
"""Tokens of one program."""
COUNT_LAUNCH = Launch({}, warps=1, stages=1)


class Work(NamedTuple):
    """What at least one row of a step needs; other kernels, or their parts, are left out. A graph has all of it."""

    penalties: bool = True
    random: bool = True
    filters: bool = True


def launches_of(vocab: int, work: Work) -> dict[str, Launch]:
    """By kernel. Lots and penalties must be rounded as on the CPU, so their kernels do not fuse."""
    chunks = power_of_two(-(-vocab // CHUNK))
    draw = {"HAS_RANDOM": work.random, "HAS_EDGES": work.filters, "CHUNKS": chunks}
    return {
        "penalise": Launch({"HAS_PENALTIES": work.penalties, "CHUNK": CHUNK}, warps=16, stages=1, fuses=False),
        "weigh": Launch({"CHUNK": CHUNK, "CHUNKS": chunks}, warps=8, stages=1, fuses=False),
        "truncate": Launch({"CHUNKS": chunks, "TILE": min(2 * CHUNK, power_of_two(vocab))}, warps=16, stages=2),
        "race": Launch({"HAS_EDGES": work.filters, "CHUNK": CHUNK}, warps=8, stages=1, fuses=False),
        "pick": Launch(draw, warps=4, stages=1, fuses=False),
    }
