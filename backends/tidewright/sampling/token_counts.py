"""How often each token stands in a request's prompt and output: counted once, then kept up with the output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tidewright.engine.plan import Draw, History

_ROOM = 256  # for tokens that are new, when the arrays are made or made larger


class TokenCounts:
    """Of all requests that have penalties, by their ids."""

    def __init__(self) -> None:
        self._counted: dict[int, _Counted] = {}

    def of(self, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        """The distinct tokens of its history, and how often each is in the output. To be read before the next step.

        The same as if all were counted anew. That is done if the list of tokens is another one, as it is for another
        request with a used id; after a preemption it is the same list.
        """
        counted, drafts = self._counted_for(draw), draw.history.drafts
        return counted.with_drafts(drafts) if drafts else counted.entries

    def place_of(self, draw: Draw) -> tuple[int, int, int]:
        """As `of`, for C: the addresses of the two arrays, and their length. Without the drafts."""
        return self._counted_for(draw).place

    def forget(self, ended: Sequence[int]) -> None:
        for request_id in ended:
            self._counted.pop(request_id, None)

    def _counted_for(self, draw: Draw) -> _Counted:
        history = draw.history
        counted = self._counted.get(draw.request_id)
        if counted is None or counted.token_ids is not history.token_ids or counted.length > history.length:
            counted = self._counted[draw.request_id] = _Counted(history)
        counted.advance(history.length)
        return counted


class _Counted:
    """The first `length` of `token_ids`."""

    def __init__(self, history: History) -> None:
        self.token_ids, self.length = history.token_ids, history.length
        known = np.array(history.token_ids[: history.length], dtype=np.int64)
        tokens, index = np.unique(known, return_inverse=True)
        self._size = len(tokens)
        self._tokens = np.append(tokens, np.zeros(_ROOM, np.int64))
        self._counts = np.bincount(index[history.prompt_length :], minlength=len(self._tokens))
        self._addresses = self._tokens.ctypes.data, self._counts.ctypes.data  # to be asked for takes a microsecond
        self._places = dict(zip(tokens.tolist(), range(self._size), strict=True))

    @property
    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        return self._tokens[: self._size], self._counts[: self._size]

    @property
    def place(self) -> tuple[int, int, int]:
        return *self._addresses, self._size

    def advance(self, length: int) -> None:
        """Counts what came since, which is output."""
        for token in self.token_ids[self.length : length]:
            place = self._places.setdefault(token, self._size)
            if place == self._size:
                if place == len(self._tokens):
                    room = np.zeros(max(place, _ROOM), np.int64)
                    self._tokens, self._counts = np.append(self._tokens, room), np.append(self._counts, room)
                    self._addresses = self._tokens.ctypes.data, self._counts.ctypes.data
                self._tokens[place] = token
                self._size += 1
            self._counts[place] += 1
        self.length = length

    def with_drafts(self, drafts: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """In a copy, as guesses may be wrong."""
        counts = self.entries[1].copy()
        more: dict[int, int] = {}
        for token in drafts:
            if (place := self._places.get(token)) is None:
                more[token] = more.get(token, 0) + 1
            else:
                counts[place] += 1
        added = np.array([*more.items()], dtype=np.int64).reshape(-1, 2)
        return np.append(self.entries[0], added[:, 0]), np.append(counts, added[:, 1])
