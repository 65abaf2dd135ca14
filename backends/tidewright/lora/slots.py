"""Which adapters requests may have, and which of them are in the device's slots. Pure, and the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar


class _HasAdapter(Protocol):
    adapter: str


Request = TypeVar("Request", bound=_HasAdapter)


class AdapterSlots:
    """A slot belongs to one adapter as long as sequences with it run; later to whoever needs it, the least recently
    used first."""

    def __init__(self, count: int) -> None:
        self._digests: dict[str, str] = {}
        self._slots: dict[str, int] = {}  # least recently used first
        self._free = list(reversed(range(count)))
        self._requests: Counter[str] = Counter()
        self._running: Counter[str] = Counter()
        self._moves: dict[int, str] = {}  # slots that no plan has filled yet

    def add(self, name: str, digest: str) -> None:
        """It is in the host's memory."""
        self._digests[name] = digest

    def remove(self, name: str) -> None:
        """It is no longer there; no request has it."""
        assert not self._requests[name], f"requests have the adapter {name!r}"
        del self._digests[name]
        self._running.pop(name, None)
        if (slot := self._slots.pop(name, None)) is not None:
            self._free.append(slot)
            self._moves.pop(slot, None)

    def digest(self, name: str) -> str | None:
        """None: there is no such adapter."""
        return self._digests.get(name)

    def requests(self, name: str) -> int:
        """That wait or run."""
        return self._requests[name]

    def join(self, name: str) -> None:
        """A request with it waits."""
        self._requests[name] += 1

    def leave(self, name: str) -> None:
        self._requests[name] -= 1
        if not self._requests[name]:
            del self._requests[name]

    def first_admissible(
        self, waiting: Iterable[Request], takes_one: Callable[[Request], bool] = lambda _: False
    ) -> Request | None:
        """The first of the requests that wait, in order, whose adapter may run now, or that `takes_one` from others.

        A request that needs a slot does not block those behind it, but for each adapter that waits for one, the least
        recently used of those that run is given to nobody behind it: so its slot becomes free.
        """
        blocked: set[str] = set()
        in_use = iter([name for name in self._slots if self._running[name]] if self._digests else [])
        for request in waiting:
            name = request.adapter
            if name not in blocked and self.can_run(name):
                return request
            if name not in self._slots and takes_one(request):
                return request
            if name not in blocked and name not in self._slots:
                blocked.update(other for other in [next(in_use, None)] if other is not None)
            blocked.add(name)
        return None

    def acquire(self, name: str) -> int:
        """A slot for one more sequence that runs; `first_admissible` said that there is one."""
        slot = self._slots.pop(name, None)
        if slot is None:
            if not self._free:
                idle = next(other for other in self._slots if not self._running[other])
                self._free.append(self._slots.pop(idle))
            slot = self._free.pop()
            self._moves[slot] = name
        self._slots[name] = slot
        self._running[name] += 1
        return slot

    def release(self, name: str) -> None:
        self._running[name] -= 1

    def take_moves(self) -> tuple[tuple[int, str], ...]:
        """The slots that the next step has to fill, and with what."""
        if not self._moves:
            return ()
        moves, self._moves = tuple(self._moves.items()), {}
        return moves

    def move_again(self, moves: Iterable[tuple[int, str]]) -> None:
        """The step with these was not computed."""
        for slot, name in moves:
            if self._slots.get(name) == slot:
                self._moves[slot] = name

    def can_run(self, name: str) -> bool:
        """Whether there is a slot for one more sequence; without a name it needs none."""
        return (
            not name
            or name in self._slots
            or bool(self._free)
            or any(not self._running[other] for other in self._slots)
        )
