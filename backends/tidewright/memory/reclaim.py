"""Which memory is reclaimed when it runs short, in which order, and when it is given back. Pure: numbers in and out.

Between the watermarks nothing happens. What is reclaimed brings the free memory up to the high one, and nothing is
given back that would bring it below: so one never follows from the other (hysteresis).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STAGES = ("free_blocks", "idle_adapters", "pool_tail")
"""In the order in which they give: blocks of the KV cache that no request has (prefixes that they hold are forgotten),
adapters that no request uses, and more of the KV cache (requests are preempted)."""


@dataclass(frozen=True)
class Watermarks:
    """Of free memory, in bytes."""

    low: int
    high: int

    @classmethod
    def of(cls, total: int) -> Watermarks:
        """For a machine, or a cgroup, with so much memory: 2.5 % and 5 %, but not more than a large step may take."""
        low = min(total // 40, 512 << 20)
        return cls(low, 2 * low)


def to_reclaim(free: int, marks: Watermarks) -> int:
    """Bytes that are wanted back."""
    return marks.high - free if free < marks.low else 0


def to_give_back(free: int, marks: Watermarks, slab: int, lacking: int) -> int:
    """Bytes that one may have again which lacks so many: a slab at a time, if all of it can be had."""
    size = min(slab, lacking)
    return size if free - size >= marks.high else 0


def share_out(wanted: int, offers: Mapping[str, int]) -> dict[str, int]:
    """What each stage gives of the `wanted` bytes, and can: a later one nothing before all others gave everything."""
    taken = {}
    for stage in STAGES:
        taken[stage] = min(max(wanted, 0), offers.get(stage, 0))
        wanted -= taken[stage]
    return taken
