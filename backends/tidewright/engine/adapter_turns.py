"""Who makes room for a sequence whose LoRA adapter has no slot. Pure, and the same on every rank.

A slot is one adapter's, so all that run with it make room together, or none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Line

from tidewright.engine.fairness import Account, goes_before
from tidewright.engine.sequence import Sequence


def sharers(sequence: Sequence, running: Line[Sequence], first: int) -> list[Sequence]:
    """All of `running` that have one other adapter, and make room for one that waits and wants its slot; or nobody.

    None of them is before number `first`, and each is of a less urgent class, or of a tenant that is ahead of its own
    and has more slots, by weight, than its own would have then. So they can't take it back.
    Of several such adapters it is one of the least urgent class, then with fewest sequences, then the last in order.
    """
    slots: defaultdict[Account, set[str]] = defaultdict(set)
    by_adapter: dict[str, list[Sequence]] = {}
    kept: set[str] = set()
    for place in range(len(running) - 1, -1, -1):
        other = running[place]
        if other.adapter:
            slots[other.account].add(other.adapter)
            by_adapter.setdefault(other.adapter, []).append(other)
            if place < first or not goes_before(sequence, other):
                kept.add(other.adapter)
    own = len(slots[sequence.account]) + 1

    def makes_room(other: Sequence) -> bool:
        if other.order[0] > sequence.order[0]:
            return True
        held, account = len(slots[other.account]), sequence.account
        is_ahead = other.account.rank >= account.rank and held * account.weight > own * other.account.weight
        return is_ahead and other.may_yield

    found = [
        group
        for adapter, group in by_adapter.items()
        if adapter not in kept and all(makes_room(each) for each in group)
    ]
    return min(found, key=lambda group: (-min(each.order[0] for each in group), len(group)), default=[])
