"""Which keys get series of their own: the busiest, so that the number of series is bounded. No I/O and no clock.

Counts decay, as in "Space-Saving" (Metwally et al., 2005) with ageing: at each `rebalance` they are halved. A key that
is demoted loses its series, and counts as `_other` from then on; that is no jump in anyone's rate.
"""

from __future__ import annotations

from collections.abc import Callable

OTHER = "_other"  # no key has such an id
_KNOWN_PER_SHOWN = 16
_AHEAD = 2.0  # how much busier a key must be than the idlest shown one


class Busiest:
    def __init__(self, size: int, demoted: Callable[[str], None], promotions: float = float("inf")) -> None:
        """
        Args:
            size: maximum number of keys with series of their own.
            demoted: is called with a key that loses its series.
            promotions: maximum number of keys that ever get series, where series can't be removed.
        """
        self._size, self._demoted, self._promotions = size, demoted, promotions
        self._counts: dict[str, float] = {}
        self._shown: set[str] = set()

    def name(self, key: str) -> str:
        """The label for one more request of this key."""
        counts = self._counts
        if key not in counts and len(counts) >= self._size * _KNOWN_PER_SHOWN:
            self._forget_idlest()
        counts[key] = counts.get(key, 0.0) + 1
        if key not in self._shown and len(self._shown) < self._size:
            self._show(key)
        return self.label(key)

    def label(self, key: str) -> str:
        """Its label now."""
        return key if key in self._shown else OTHER

    def rebalance(self) -> None:
        """Call it now and then: gives series to keys that have become busier than shown ones."""
        counts = self._counts
        hidden = sorted(counts.keys() - self._shown, key=counts.__getitem__)
        shown = sorted(self._shown, key=lambda key: counts.get(key, 0.0), reverse=True)
        while hidden and shown and self._promotions >= 1:
            busy, idle = hidden.pop(), shown.pop()
            if counts[busy] <= _AHEAD * counts.get(idle, 0.0):
                break
            self._shown.discard(idle)
            self._demoted(idle)
            self._show(busy)
        self._counts = {key: count / 2 for key, count in counts.items() if count >= 1 or key in self._shown}

    def _show(self, key: str) -> None:
        if self._promotions >= 1:
            self._promotions -= 1
            self._shown.add(key)

    def _forget_idlest(self) -> None:
        """Half of the keys without series: a flood of new keys must not cost a search each."""
        hidden = sorted(self._counts.keys() - self._shown, key=self._counts.__getitem__)
        for key in hidden[: max(len(hidden) // 2, 1)]:
            del self._counts[key]
