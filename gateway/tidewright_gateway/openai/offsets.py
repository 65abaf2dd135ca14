"""Offset of each token in the text of an output (`text_offset` of completions)."""

from __future__ import annotations

from collections.abc import Sequence

from tidewright.detokenizer import Detokenizer
from tidewright.tokenization import Tokenizer

_PART = "\ufffd"  # in the text of a token that holds a part of a character


class Offsets:
    """Of one output. A token that is part of a character has the offset of that character."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._detokenizer = Detokenizer.behind(prompt, tokenizer, skip_special_tokens)
        self._length = 0  # of the text so far, in characters

    def next(self, token_id: int, text: str) -> int:
        """Offset of the next token. `text`: the token's own text, from its log-probability entry."""
        before = self._length
        self._length += len(self._detokenizer.push(token_id))
        if _PART in text:
            return before
        # Its text ends the certain text; a character of preceding tokens may have been completed before it.
        return max(before, self._length - len(text))
