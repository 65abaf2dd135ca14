"""Where in the text of an output each token begins, as completions tell it beside log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from tidewright.detokenizer import Detokenizer
from tidewright.tokenization import Tokenizer

_PART = "\ufffd"  # in the text of a token that holds a part of a character


class Offsets:
    """Of one output. A token with a part of a character begins where the character does."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._detokenizer = Detokenizer.behind(prompt, tokenizer)
        self._length = 0  # of the text so far, in characters

    def next(self, token_id: int, text: str) -> int:
        """Of the next token. `text`: its own, as its log-probability has it."""
        before = self._length
        self._length += len(self._detokenizer.push(token_id))
        if _PART in text:
            return before
        # Its text is the end of what is certain now; before it may stand a character that its predecessors made.
        return max(before, self._length - len(text))
