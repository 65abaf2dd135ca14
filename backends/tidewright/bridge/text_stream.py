"""The text of a sequence that its caller gets: up to a stop string, and nothing that may still become one.

Tokens go through one by one, so the text does not depend on how they were grouped on their way here.
"""

from __future__ import annotations

from collections.abc import Sequence

from tidewright.detokenizer import Detokenizer
from tidewright.schema import SamplingParams
from tidewright.tokenization import Tokenizer


class TextStream:
    """The text of one sequence behind its prompt.

    Text that may be the beginning of a stop string is held back until it is known not to be one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._detokenizer = Detokenizer.behind(prompt_token_ids, tokenizer, sampling.skip_special_tokens)
        self._stop = sampling.stop_strings
        self._keeps_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        self._held = ""
        self._ignored = 0  # characters at the start of what is not returned yet, in which no stop string counts
        self.stopped_by: str | None = None
        """The stop string that was found: no more text comes, and the sequence is over."""

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain."""
        self._num_tokens += 1
        return self._release(self._detokenizer.push(token_id), self._detokenizer.tentative)

    def finish(self) -> str:
        """The rest of the text, when no further token comes: what could have begun a stop string, or a character."""
        text = self._release(self._detokenizer.finish(), "")
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str, tentative: str) -> str:
        """`tentative`: text that may follow, or become another; it can stop the sequence as any."""
        if not self._stop or self.stopped_by is not None:
            return "" if self.stopped_by is not None else text
        if self._num_tokens < self._min_tokens:
            self._ignored = len(tentative)
            return text
        text = self._held + text
        following = text + tentative
        # Of several, the one that begins first, and of those the one that ends first.
        found = [(at, len(stop), stop) for stop in self._stop if (at := following.find(stop, self._ignored)) >= 0]
        if found:
            at, length, self.stopped_by = min(found)
            self._held = ""
            return following[: at + length if self._keeps_stop else at]
        searched = following[self._ignored :]
        free = len(following) - max(_overlap(searched, stop) for stop in self._stop)
        released, self._held = text[:free], text[free:]
        self._ignored = max(self._ignored - len(released), 0)
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
