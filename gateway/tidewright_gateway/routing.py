"""Which replica gets a request. Pure: what is known of the replicas comes in as an argument."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

PREFIX_BLOCK = 32  # tokens; beginnings of prompts are compared in whole blocks
PREFIX_BLOCKS = 65_536  # blocks that are remembered
# A replica that has the prompt's beginning may have so many times the least load, and so many requests more.
IMBALANCE_FACTOR, IMBALANCE_SLACK = 1.5, 4


@dataclass(frozen=True)
class Candidate:
    name: str
    in_flight: int
    """Requests there."""
    load: float | None
    """0 to about 1: its queue and KV cache, as it says; None if it did not say so lately."""

    @property
    def cost(self) -> float:
        """In requests: what waits there or fills its cache counts as more of them, in steps, for less is noise."""
        load = round(self.load or 0, 1)
        return self.in_flight * (1 + load) + 8 * load


class Router(Protocol):
    def choose(self, candidates: Sequence[Candidate], prompt: Sequence[int]) -> int:
        """Index of the one to take; there is at least one."""
        ...


class RoundRobin:
    def __init__(self) -> None:
        self._turn = 0

    def choose(self, candidates: Sequence[Candidate], prompt: Sequence[int]) -> int:
        self._turn += 1
        return self._turn % len(candidates)


class LeastLoad:
    """The least cost; among equals, in turn."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, candidates: Sequence[Candidate], prompt: Sequence[int]) -> int:
        # One that says nothing would look idle: then all are compared by what is known of all.
        known = all(candidate.load is not None for candidate in candidates)
        costs = [candidate.cost if known else float(candidate.in_flight) for candidate in candidates]
        self._turn += 1
        order = [(self._turn + offset) % len(costs) for offset in range(len(costs))]
        return min(order, key=costs.__getitem__)


class PrefixAware:
    """The replica that was sent the longest beginning of this prompt before, unless it has much more load than others.

    A table of hashed blocks, each with the replica that computed it last, as the prefix cache of the engine has them:
    it is a guess of what their caches hold, and costs time only where it is wrong.
    """

    def __init__(self, fallback: Router) -> None:
        self._fallback = fallback
        self._homes: OrderedDict[int, str] = OrderedDict()

    def choose(self, candidates: Sequence[Candidate], prompt: Sequence[int]) -> int:
        blocks = _blocks(prompt)
        index = self._home_of(blocks, candidates)
        if index is None:
            index = self._fallback.choose(candidates, prompt)
        for block in blocks:
            self._homes[block] = candidates[index].name
            self._homes.move_to_end(block)
        while len(self._homes) > PREFIX_BLOCKS:
            self._homes.popitem(last=False)
        return index

    def _home_of(self, blocks: list[int], candidates: Sequence[Candidate]) -> int | None:
        limit = min(candidate.in_flight for candidate in candidates) * IMBALANCE_FACTOR + IMBALANCE_SLACK
        allowed = {c.name: index for index, c in enumerate(candidates) if c.in_flight <= limit}
        for block in reversed(blocks):
            home = self._homes.get(block)
            if home in allowed:
                return allowed[home]
        return None


def _blocks(prompt: Sequence[int]) -> list[int]:
    """A hash for each whole block, of all tokens up to its end."""
    found, so_far = [], 0
    for end in range(PREFIX_BLOCK, len(prompt) + 1, PREFIX_BLOCK):
        so_far = hash((so_far, *prompt[end - PREFIX_BLOCK : end]))
        found.append(so_far)
    return found


def make_router(name: str) -> Router:
    """By the name in `GatewaySettings.routing`."""
    if name == "round_robin":
        return RoundRobin()
    return PrefixAware(LeastLoad()) if name == "prefix" else LeastLoad()
