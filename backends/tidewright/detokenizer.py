"""Token ids to text, one token at a time: the tokenizer's own decoding of prompt and output, less that of the prompt.

The text of a token depends on what is before it: many tokenizers drop a leading space at the start of a text, and the
bytes of a character may be spread over tokens. No token of the output is an error, and each costs the same.
"""

from __future__ import annotations

import codecs
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from tidewright.tokenization import Tokenizer

CONTEXT = 4  # tokens, at least a byte each: from any byte on, UTF-8 is read right again after three
MAX_WINDOW = 10  # tokens that are decoded at once
MAX_HELD = 32  # bytes of byte tokens whose text is held back

_INVALID = "\ufffd"


class Detokenizer(ABC):
    """The text of one sequence."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._has_text = tokenizer.is_text if skip_special_tokens else tokenizer.has_token

    @property
    def tentative(self) -> str:
        """Text that comes next if the sequence ends now, but may still become another."""
        return ""

    @staticmethod
    def behind(prompt_token_ids: Sequence[int], tokenizer: Tokenizer, skip_special_tokens: bool = True) -> Detokenizer:
        return (_ByteFallback if tokenizer.bytes else _Window)(prompt_token_ids, tokenizer, skip_special_tokens)

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain."""
        return self._push(token_id) if self._has_text(token_id) else ""

    @abstractmethod
    def finish(self) -> str:
        """The rest of the text, when no further token comes: half a character becomes one U+FFFD."""

    @abstractmethod
    def _push(self, token_id: int) -> str: ...

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)

    def _backwards(self, token_ids: Sequence[int]) -> Iterator[int]:
        """Those that have text, the last first."""
        return filter(self._has_text, reversed(token_ids))


class _Window(Detokenizer):
    """Of any tokenizer whose tokens have text of their own, or bytes as in GPT-2: decodes the last few together.

    A character that is not complete is decoded as one U+FFFD, so a last U+FFFD is never certain.
    """

    def __init__(self, prompt_token_ids: Sequence[int], tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._token_ids = list(itertools.islice(self._backwards(prompt_token_ids), CONTEXT))[::-1]
        text = self._decode(self._token_ids)
        self._known = len(text.removesuffix(_INVALID))  # characters of the window that were returned, or the prompt's
        self._is_open = text.endswith(_INVALID)
        """The prompt ends with U+FFFD, which may be part of a character that the output goes on with."""

    def _push(self, token_id: int) -> str:
        if len(self._token_ids) >= MAX_WINDOW:
            self._token_ids = self._token_ids[-CONTEXT:]
            self._known = len(self._decode(self._token_ids).removesuffix(_INVALID))
        self._token_ids.append(token_id)
        return self._news(self._decode(self._token_ids).removesuffix(_INVALID))

    def finish(self) -> str:
        return self._news(self._decode(self._token_ids))

    def _news(self, text: str) -> str:
        if self._is_open and len(text) > self._known:
            self._is_open = False
            self._known += text[self._known] == _INVALID  # the prompt's own
        news = text[self._known :]
        self._known = max(self._known, len(text))
        return news


class _ByteFallback(Detokenizer):
    """Of a tokenizer with a token for each byte, for what its words can't spell (Llama 2, Mistral, Gemma).

    All other tokens have a text of their own, but the decoder may drop a space at the start of the whole.
    """

    def __init__(self, prompt_token_ids: Sequence[int], tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens)
        self._bytes = tokenizer.bytes
        self._has_begun = any(map(self._has_text, prompt_token_ids))
        last = itertools.takewhile(self._bytes.__contains__, self._backwards(prompt_token_ids))
        self._run = _ByteRun(bytes(self._bytes[token_id] for token_id in last)[::-1])

    @property
    def tentative(self) -> str:
        return self._run.text

    def _push(self, token_id: int) -> str:
        text = self._tokenizer.token_text(token_id) if self._has_begun else self._decode([token_id])
        self._has_begun = True
        byte = self._bytes.get(token_id)
        if byte is not None:
            return self._run.push(byte, is_dropped=not text)
        text = self._run.end() + text
        self._run = _ByteRun()
        return text

    def finish(self) -> str:
        return self._run.finish()


class _ByteRun:
    """Byte tokens in a row, which ByteFallback of tokenizers reads together: if they are not UTF-8, each is U+FFFD.

    So no text of a run is certain before its end. That would be late for a script of which the vocabulary has nothing:
    a character more than MAX_HELD bytes ago is returned, and stays even if the run turns out invalid.
    """

    def __init__(self, prompt: bytes = b"") -> None:
        """`prompt`: the bytes of the run that the prompt ends with."""
        self.text = ""
        """Whole characters that are not returned yet."""
        self._held = 0  # bytes that are not returned yet
        self._is_valid = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        try:
            self._utf8.decode(prompt)
        except UnicodeDecodeError:
            self._is_valid = False

    def push(self, byte: int, *, is_dropped: bool) -> str:
        """`is_dropped`: the character has no text, as it begins the whole."""
        if not self._is_valid:
            return _INVALID
        self._held += 1
        try:
            text = self._utf8.decode(bytes((byte,)))
        except UnicodeDecodeError:
            return self._invalidate()
        self.text += "" if is_dropped else text
        if self._held <= MAX_HELD or not self.text:
            return ""
        first, self.text = self.text[0], self.text[1:]
        self._held -= len(first.encode())
        return first

    def end(self) -> str:
        """The rest of its text, when other text follows."""
        return self._invalidate() if self._is_cut else self.text

    def finish(self) -> str:
        """The rest of its text, when nothing follows."""
        return self.text + _INVALID * self._is_cut

    @property
    def _is_cut(self) -> bool:
        """Its last character is not complete."""
        return self._is_valid and bool(self._utf8.getstate()[0])

    def _invalidate(self) -> str:
        self.text, self._is_valid = "", False
        return _INVALID * self._held
