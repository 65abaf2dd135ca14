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
FIRST_SHARE = 0.1  # of its requests, for a replica that has just come


@dataclass(frozen=True)
class Candidate:
    name: str
    in_flight: int
    """Requests there."""
    load: float | None
    """0 to about 1: its queue and KV cache, as it says; None if it did not say so lately."""
    weight: float = 1.0
    """Above 0; only relative to the others'."""
    share: float = 1.0
    """Of what its weight gives it: less than 1 while it is new (slow start)."""

    @property
    def capacity(self) -> float:
        return self.weight * self.share

    @property
    def cost(self) -> float:
        """In requests: what waits there or fills its cache counts as more of them, in steps, for less is noise."""
        load = round(self.load or 0, 1)
        return self.in_flight * (1 + load) + 8 * load


def slow_start(since: float, duration: float) -> float:
    """Share of a replica that came `since` seconds ago: all of it after `duration` seconds, and linear until then."""
    return 1.0 if since >= duration else FIRST_SHARE + (1 - FIRST_SHARE) * max(since, 0.0) / duration


class Router(Protocol):
    def choose(self, candidates: Sequence[Candidate], prompt: Sequence[int], adapter: str | None = None) -> int:
        """Index of the one to take; there is at least one. `adapter`: the LoRA adapter that the prompt is for."""
        ...

    def forget(self, name: str) -> None:
        """This replica is gone."""
        ...


class RoundRobin:
    """In turn, by capacity: nginx's smooth weighted round robin, which spreads the turns of a heavy one evenly."""

    def __init__(self) -> None:
        self._credits: dict[str, float] = {}

    def choose(self, candidates: Sequence[Candidate], prompt: Sequence[int], adapter: str | None = None) -> int:
        # What the unit of the weights is must not matter to what is kept from one choice to the next.
        unit = max(candidate.capacity for candidate in candidates)
        total = 0.0
        for candidate in candidates:
            earned = candidate.capacity / unit
            total += earned
            self._credits[candidate.name] = self._credits.get(candidate.name, 0.0) + earned
        index = max(range(len(candidates)), key=lambda index: self._credits[candidates[index].name])
        self._credits[candidates[index].name] -= total
        return index

    def forget(self, name: str) -> None:
        self._credits.pop(name, None)


class LeastLoad:
    """The least cost by capacity; in turn among those that are no worse than the least would be with one more.

    So idle ones get their shares too, where the least load alone would always be the heaviest one's.
    """

    def __init__(self) -> None:
        self._turns = RoundRobin()

    def choose(self, candidates: Sequence[Candidate], prompt: Sequence[int], adapter: str | None = None) -> int:
        # One that says nothing would look idle: then all are compared by what is known of all.
        known = all(candidate.load is not None for candidate in candidates)
        costs = [candidate.cost if known else float(candidate.in_flight) for candidate in candidates]
        limit = min((cost + 1) / candidate.capacity for cost, candidate in zip(costs, candidates, strict=True))
        able = [index for index, cost in enumerate(costs) if cost / candidates[index].capacity < limit]
        return able[self._turns.choose([candidates[index] for index in able], prompt)]

    def forget(self, name: str) -> None:
        self._turns.forget(name)


class PrefixAware:
    """The replica that was sent the longest beginning of this prompt before, unless it has much more load than others.

    A table of hashed blocks, each with the replica that computed it last, as the prefix cache of the engine has them:
    it is a guess of what their caches hold, and costs time only where it is wrong.
    """

    def __init__(self, fallback: Router) -> None:
        self._fallback = fallback
        self._homes: OrderedDict[int, str] = OrderedDict()

    def choose(self, candidates: Sequence[Candidate], prompt: Sequence[int], adapter: str | None = None) -> int:
        blocks = _blocks(prompt, adapter)
        index = self._home_of(blocks, candidates)
        if index is None:
            index = self._fallback.choose(candidates, prompt)
        for block in blocks:
            self._homes[block] = candidates[index].name
            self._homes.move_to_end(block)
        while len(self._homes) > PREFIX_BLOCKS:
            self._homes.popitem(last=False)
        return index

    def forget(self, name: str) -> None:
        """Its blocks stay: they find nobody, and make room in time."""
        self._fallback.forget(name)

    def _home_of(self, blocks: list[int], candidates: Sequence[Candidate]) -> int | None:
        unit = max(candidate.capacity for candidate in candidates)
        loads = [candidate.in_flight * unit / candidate.capacity for candidate in candidates]
        limit = min(loads) * IMBALANCE_FACTOR + IMBALANCE_SLACK
        # A new one has an empty cache, and must get no more than its share: that is the fallback's to see to.
        full = max(candidate.share for candidate in candidates)
        allowed = {
            candidate.name: index
            for index, (candidate, load) in enumerate(zip(candidates, loads, strict=True))
            if load <= limit and (candidate.share >= 1 or full < 1)
        }
        for block in reversed(blocks):
            home = self._homes.get(block)
            if home in allowed:
                return allowed[home]
        return None


def _blocks(prompt: Sequence[int], adapter: str | None = None) -> list[int]:
    """A hash for each whole block, of all tokens up to its end, and of the adapter: its keys and values are its own."""
    found, so_far = [], hash(adapter) if adapter else 0
    for end in range(PREFIX_BLOCK, len(prompt) + 1, PREFIX_BLOCK):
        so_far = hash((so_far, *prompt[end - PREFIX_BLOCK : end]))
        found.append(so_far)
    return found


def make_router(name: str) -> Router:
    """By the name in `GatewaySettings.routing`."""
    if name == "round_robin":
        return RoundRobin()
    return PrefixAware(LeastLoad()) if name == "prefix" else LeastLoad()
