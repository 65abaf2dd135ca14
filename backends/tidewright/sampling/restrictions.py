"""Which tokens a step's rows may have, and which are favoured: what the host knows before it looks at any logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tidewright.engine.plan import Draw
from tidewright.sampling.guided import GuidedDecoding
from tidewright.step.sampling import unusable


@dataclass
class Restrictions:
    """In this order: a row in `allowed` may have only tokens with a 1, and none of `banned`; then biases are added."""

    allowed: dict[int, np.ndarray] = field(default_factory=dict)  # by row, a number for each token
    banned: list[tuple[int, int]] = field(default_factory=list)  # row, token
    biases: list[tuple[int, int, float]] = field(default_factory=list)  # row, token, what is added
    errors: dict[int, str] = field(default_factory=dict)  # by row: its request can't go on

    @classmethod
    def of(cls, draws: Sequence[Draw], vocab_size: int, guided: GuidedDecoding | None) -> Restrictions:
        """Without `guided` no grammar is followed."""
        made = cls()
        if guided:
            made.allowed, made.errors = guided.allowed(draws)
        for row, draw in enumerate(draws):
            params = draw.params
            if params.allowed_token_ids is not None or params.logit_bias or draw.banned_ids or draw.bad_words_ids:
                try:
                    made._add(row, draw, vocab_size)
                except Exception as error:  # that row's alone
                    made.errors.setdefault(row, unusable(error))
        return made

    @property
    def changes_logits(self) -> bool:
        return bool(self.allowed or self.banned or self.biases)

    def _add(self, row: int, draw: Draw, vocab_size: int) -> None:
        """Raises what is wrong with the row's parameters."""
        biases = (draw.params.logit_bias or {}).items()
        banned = {*draw.banned_ids, *_ends_of_bad_words(draw)}
        if any(not 0 <= token < vocab_size for token in (*banned, *(token for token, _ in biases))):
            raise IndexError(f"a token is outside of the vocabulary of {vocab_size}")
        allowed_V = self.allowed.get(row)
        if draw.params.allowed_token_ids is not None:
            among_V = np.zeros(vocab_size, np.uint8)
            among_V[draw.params.allowed_token_ids] = 1
            self.allowed[row] = among_V if allowed_V is None else among_V & allowed_V
            if allowed_V is not None and not self.allowed[row].any():
                self.errors.setdefault(row, "guided output failed: none of allowed_token_ids can follow")
        if row in self.allowed:
            # Bad words, then all bans, give way where they would leave no token.
            candidates = (banned, set(draw.banned_ids))
            banned = next((some for some in candidates if _leaves_any(self.allowed[row], some)), set())
        self.banned += [(row, token) for token in banned]
        self.biases += [(row, token, bias) for token, bias in biases]


def _ends_of_bad_words(draw: Draw) -> Iterator[int]:
    """The last token of each bad word whose other tokens end the history."""
    for word in draw.bad_words_ids:
        if draw.history.tail(len(word) - 1) == word[:-1]:
            yield word[-1]


def _leaves_any(allowed_V: np.ndarray, banned: set[int]) -> bool:
    return bool(np.count_nonzero(allowed_V) > np.count_nonzero(allowed_V[list(banned)]))
