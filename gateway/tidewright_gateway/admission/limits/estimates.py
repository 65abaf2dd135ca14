"""How long answers are that no max_tokens bounds: what a request reserves before anybody knows."""

from __future__ import annotations

from cachetools import LRUCache

from tidewright_gateway.auth.callers import Caller

FIRST = 256  # tokens, of a key's first answer
WEIGHT = 0.1  # of the newest answer in the mean
LEAST = 16  # tokens: after many short answers, a longer one must not grow token by token
KEYS = 10_000  # that are remembered


class Estimates:
    """A moving mean for each key."""

    def __init__(self) -> None:
        self._means: LRUCache[str, float] = LRUCache(KEYS)

    def of(self, caller: Caller) -> int:
        """Tokens."""
        return max(round(self._means.get(caller.key_id, FIRST)), LEAST)

    def learn(self, caller: Caller, num_tokens: float) -> None:
        """Of an answer that has ended."""
        mean = self._means.get(caller.key_id, FIRST)
        self._means[caller.key_id] = mean + WEIGHT * (num_tokens - mean)
