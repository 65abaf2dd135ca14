"""Guided output: keeps each request's place in its grammar, and masks the tokens that the grammar does not allow next.

The grammars and their matchers are llguidance's; transformers is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import llguidance
import llguidance.numpy
import numpy as np

from tidewright.engine.plan import Draw, History
from tidewright.sampling.grammar import GrammarError, check_matcher, make_matcher
from tidewright.schema import SamplingParams


@dataclass
class _Place:
    """Where a request's output stands in its grammar: `consumed` is what the matcher has seen.

    `certain` of them are known tokens of `token_ids`, not guesses: they can't change.
    """

    params: SamplingParams
    matcher: llguidance.LLMatcher
    consumed: list[int] = field(default_factory=list)
    token_ids: Sequence[int] = ()
    certain: int = 0

    def move_to(self, history: History) -> None:
        """Behind its output, wherever the matcher stood: it goes back over guessed tokens that were wrong.

        Raises:
            GrammarError: the grammar does not allow that output.
        """
        num_known = history.length - history.prompt_length
        shared = self.certain if self.token_ids is history.token_ids and self.certain <= num_known else 0
        new = history.output(shared)
        pairs = zip(self.consumed[shared:], new, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        shared, new = shared + same, new[same:]
        if shared < len(self.consumed):
            self.matcher.rollback(len(self.consumed) - shared)
        accepted = self.matcher.try_consume_tokens(new) if new else 0
        self.consumed[shared:] = new[:accepted]
        self.token_ids, self.certain = history.token_ids, min(len(self.consumed), num_known)
        check_matcher(self.matcher)
        if accepted < len(new):
            raise GrammarError(f"the output left the grammar at its token number {shared + accepted + 1}")


class GuidedDecoding:
    """The guided requests of a model. Its first guided request waits for the tokenizer, 0.3 s or so."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._places: dict[int, _Place] = {}

    def allowed(self, draws: Sequence[Draw]) -> tuple[dict[int, np.ndarray], dict[int, str]]:
        """Of the guided rows: which tokens the grammar allows next, as 0 and 1; behind a complete output only EOS.

        And what went wrong, by row. Such a row is left with EOS only; the others go on.
        """
        rows = [row for row, draw in enumerate(draws) if draw.params.guided]
        errors: dict[int, str] = {}
        if not rows:
            return {}, errors
        bits_RI = np.zeros((len(rows), -(-self._vocab_size // 32)), dtype=np.int32)
        for index, row in enumerate(rows):
            try:
                self._allow(draws[row], bits_RI, index)
            except Exception as error:  # llguidance's own, too: it is one request's grammar
                errors[row] = f"guided output failed: {error}"
        allowed_RV = np.unpackbits(bits_RI.view(np.uint8), axis=1, count=self._vocab_size, bitorder="little")
        for index, row in enumerate(rows):
            if row in errors:
                allowed_RV[index] = 0
                allowed_RV[index, self._eos_ids] = 1
        return dict(zip(rows, allowed_RV, strict=True)), errors

    def forget(self, ended: Sequence[int]) -> None:
        for request_id in ended:
            self._places.pop(request_id, None)

    def prepare(self, request_id: int, params: SamplingParams) -> None:
        """Makes a request's grammar beforehand; from any thread.

        Raises:
            GrammarError: it can't be followed.
        """
        self._places[request_id] = _Place(params, make_matcher(params, self._load_tokenizer()))

    def _allow(self, draw: Draw, bits_RI: np.ndarray, index: int) -> None:
        # Another request may come with an id that was used before.
        if (place := self._places.get(draw.request_id)) is None or place.params != draw.params:
            self.prepare(draw.request_id, draw.params)
            place = self._places[draw.request_id]
        place.move_to(draw.history)
        llguidance.numpy.fill_next_token_bitmask(place.matcher, bits_RI, index)
        check_matcher(place.matcher)

    def _load_tokenizer(self) -> llguidance.LLTokenizer:
        if self._tokenizer is None:
            try:
                self._tokenizer = llguidance.LLTokenizer(str(self._file), self._vocab_size, self._eos_ids or None)
            except ValueError as error:
                raise GrammarError(f"the model's tokenizer can't be used: {error}") from None
        return self._tokenizer
