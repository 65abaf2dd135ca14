"""Which LoRA adapters all replicas should have: for each name, the newest command of any gateway. Pure.

Each replica tells in its status what it was commanded, and when (schema.AdapterStatus). Merged by the newest, that
gives every gateway and worker the same book, without a store of their own: a last-writer-wins map (Shapiro et al., "A
comprehensive study of convergent and commutative replicated data types", 2011).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tidewright.schema import MAX_ADAPTERS_KNOWN, AdapterStatus


class AdapterBook:
    def __init__(self) -> None:
        self._newest: dict[str, AdapterStatus] = {}

    def note(self, found: Iterable[AdapterStatus]) -> None:
        """What a replica says, or what it was told. Its own configuration is no command for others."""
        for status in found:
            known = self._newest.get(status.name)
            if status.at and (known is None or status.at > known.at):
                self._newest[status.name] = status
        while len(self._newest) > MAX_ADAPTERS_KNOWN:
            # Unloaded names first: forgetting one only means that a replica that was away may still have it.
            oldest = min(self._newest.values(), key=lambda status: (status.loaded, status.at))
            del self._newest[oldest.name]

    @property
    def wanted(self) -> dict[str, AdapterStatus]:
        """The adapters that replicas should have, by name."""
        return {name: status for name, status in self._newest.items() if status.loaded}

    def newest(self, name: str) -> AdapterStatus | None:
        return self._newest.get(name)

    def due(self, has: Mapping[str, AdapterStatus]) -> list[AdapterStatus]:
        """The commands that a replica has missed. `has`: what it knows, by name."""
        return [wanted for wanted in self._newest.values() if _differs(wanted, has.get(wanted.name))]


def _differs(wanted: AdapterStatus, has: AdapterStatus | None) -> bool:
    if has is not None and has.at >= wanted.at:
        return False
    if has is None or not has.loaded:
        return wanted.loaded
    return not wanted.loaded or has.path != wanted.path
