"""A list of tokens that counts how many of them are read: what must not be read as a whole at every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import SupportsIndex, overload


class WatchedList(list[int]):
    read = 0

    @overload
    def __getitem__(self, index: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> int | list[int]:
        found = super().__getitem__(index)
        self.read += len(found) if isinstance(found, list) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        self.read += len(self)
        return super().__iter__()
