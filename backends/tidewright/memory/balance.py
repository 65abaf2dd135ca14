"""How several models on one device divide the memory for their KV caches, by what their requests need. Pure.

A model lacks memory if its requests needed more than it has, all the time lately. It gets what others can spare: they
keep a quarter more than they needed at most in a longer time. So one that has given lacks nothing before its need has
grown by a quarter, and nothing goes back and forth (hysteresis). If that does not suffice, those that lack memory and
have less than their configured share get it from those that have more than theirs. What nobody has, because a model was
unloaded, is given away at once; from one model to another only so much moves at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HEADROOM = 1.25  # times what is needed
GRAIN = 64  # a smaller part of the whole is not worth a resize


@dataclass(frozen=True)
class Claim:
    """Of one model, in bytes on each rank."""

    held: int
    share: int  # as configured: when it needs so much, it has it
    floor: int  # it gives nothing below
    room: int  # it can't use more
    lately: int  # needed all the time lately
    peak: int  # needed at most in a longer time

    def lack(self, held: int) -> int:
        """With `held` instead of what it had when it was looked at."""
        return max(self._wanted(self.lately) - held, 0) if self.lately > self.held else 0

    def missing_share(self, held: int) -> int:
        return min(self.lack(held), max(self.share - held, 0))

    def spare(self, held: int) -> int:
        """It does not need that."""
        return 0 if self.lack(self.held) else max(held - max(self._wanted(self.peak), self.floor), 0)

    def surplus(self, held: int) -> int:
        """More than its share, whether it needs that or not."""
        return max(held - max(self.share, self.floor), 0)

    def _wanted(self, needed: int) -> int:
        return min(int(needed * HEADROOM), self.room)


def balance(claims: Mapping[str, Claim], free: int, step: int) -> dict[str, int]:
    """What each model has from now on. `free`: bytes that nobody has; `step`: that may move from model to model."""
    held = {name: claim.held for name, claim in claims.items()}
    grain = (sum(held.values()) + free) // GRAIN

    def each(of: str) -> dict[str, int]:
        return {name: getattr(claim, of)(held[name]) for name, claim in claims.items()}

    def give(size: int, wants: Mapping[str, int]) -> int:
        """How much they took."""
        parts = _divided(size, wants)
        for name, part in parts.items():
            held[name] += part
        return sum(parts.values())

    if free > grain:
        free -= give(free, each("missing_share"))
        free -= give(free, each("lack"))
        give(free, {name: max(claim.room - held[name], 0) for name, claim in claims.items()})
    for giving, wanting in (("spare", "missing_share"), ("spare", "lack"), ("surplus", "missing_share")):
        offers, wants = each(giving), each(wanting)
        size = min(step, sum(offers.values()), sum(wants.values()))
        if size > grain:
            for name, part in _divided(size, offers).items():
                held[name] -= part
            step -= give(size, wants)
    return held


def _divided(size: int, wants: Mapping[str, int]) -> dict[str, int]:
    """To each in proportion to what it wants, and no more: all of `size`, if they want as much."""
    parts, left = {}, sum(wants.values())
    size = min(size, left)
    for name, want in wants.items():
        parts[name] = size * want // left if left else 0
        size, left = size - parts[name], left - want
    return parts
