"""Guesses the next tokens of a sequence from what it already holds: speculative decoding without a draft model.

Source: prompt lookup decoding (Saxena, 2023), which takes what followed the last occurrence of the latest n-gram.
"""

from __future__ import annotations

from collections.abc import Sequence

_SIZES = (3, 2)  # n-grams, the longest first: its continuation is the likeliest


class PromptLookup:
    """For one sequence: where each n-gram ended last. O(1) a token."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, token_ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow `token_ids`, which only ever grow from call to call."""
        # The latest n-gram itself is left out: it must be found where it stood before.
        for end in range(self._indexed + 1, len(token_ids)):
            for size in _SIZES:
                if end >= size:
                    self._ends[tuple(token_ids[end - size : end])] = end
        self._indexed = max(self._indexed, len(token_ids) - 1)
        for size in _SIZES:
            before = self._ends.get(tuple(token_ids[-size:]))
            if before is not None:
                return list(token_ids[before : before + count])
        return []
