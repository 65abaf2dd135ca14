"""Who makes room for a request whose turn it is: less urgent ones, and tenants that hold more than its own. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tidewright.engine.fairness import Account
from tidewright.engine.sequence import Sequence


def victims(
    sequence: Sequence, running: list[Sequence], first: int, blocks: int, size: tuple[int, int]
) -> Iterator[Sequence]:
    """Which of `running`, from number `first` on, make room for one that waits and wants `blocks`, in this order.

    First those of less urgent classes. Then, of its own class, those whose tenants are ahead of its own and hold more,
    by weight, than its own would: the larger of their shares of places and blocks, of which there are `size` (dominant
    shares, Ghodsi et al., NSDI 2011). As its own tenant then holds less than they did, they can't take it back.
    """
    for other in reversed(running[first:]):
        if other.order[0] <= sequence.order[0]:
            break
        yield other
    account = sequence.account
    rivals = [s for s in running[first:] if s.order[0] == sequence.order[0] and s.account is not account]
    if not rivals:
        return
    held = _held(running)
    num_running, num_blocks = held.get(account, (0, 0))
    own = _dominant((num_running + 1, num_blocks + blocks), size)
    for other in reversed(rivals):
        rival = other.account
        if rival.rank < account.rank or not other.may_yield:
            continue
        if _dominant(held[rival], size) * account.weight > own * rival.weight:
            held[rival] = held[rival][0] - 1, held[rival][1] - len(other.block_table)
            yield other


def _held(running: Iterable[Sequence]) -> dict[Account, tuple[int, int]]:
    held: dict[Account, tuple[int, int]] = {}
    for sequence in running:
        count, blocks = held.get(sequence.account, (0, 0))
        held[sequence.account] = count + 1, blocks + len(sequence.block_table)
    return held


def _dominant(held: tuple[int, int], size: tuple[int, int]) -> int:
    """In units that only depend on `size`."""
    return max(held[0] * size[1], held[1] * size[0])
