"""Token ids to text, one token at a time: whole characters only, and nothing of a stop string.

Tokens go through one by one, so the text does not depend on how they were grouped on their way here.
"""

from __future__ import annotations

from tokenizers.decoders import DecodeStream

from tidewright.tokenization import Tokenizer


class TextStream:
    """The text of one sequence.

    Text that may be the beginning of a stop string is held back until it is known not to be one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._decoded = 0  # characters that the decoder gave so far
        self._held = ""
        self.stopped = False
        """A stop string was found: no more text comes, and the sequence is over."""

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain."""
        self._token_ids.append(token_id)
        text = self._decoder.step(self._tokenizer.backend, token_id) or ""
        self._decoded += len(text)
        return self._release(text)

    def finish(self) -> str:
        """The rest of the text, when no further token comes.

        That is what the decoder still kept, waiting for the last bytes of a character (they are now U+FFFD, as in
        a decoding of the whole), and what could have begun a stop string.
        """
        whole = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        text = self._release(whole[self._decoded :])
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if not self._stop or not text or len(self._token_ids) < self._min_tokens:
            return text
        text = self._held + text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
