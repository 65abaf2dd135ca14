"""Text and chat messages to token ids and back, light enough for Triton's stub processes: no torch, no transformers."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import tokenizers

from tidewright.chat_template import ChatTemplate, TemplateError

# What chat templates may name. One that the model lacks is left out: it must print as nothing, not as "None".
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # of generation_config.json
_KNOWN_TEXTS = 65_536  # tokens whose text is remembered, at most
_MAX_ESCAPE = 6  # characters of JSON for one of its text, as \u00e9
LONG_TEXT = 16_384  # characters; tokenizing more takes so long that others should not wait for it


_PART = "\ufffd"


def _bytes_of_characters() -> dict[str, int]:
    """How byte-level vocabularies write bytes: the printable ones of Latin-1 as they are, the others from U+0100 on.

    GPT-2's table (https://github.com/openai/gpt-2, src/encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable}
    return found | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _bytes_of_characters()


class InvalidPromptError(ValueError):
    """A prompt that can't be tokenized; the message is for the caller."""


class PromptTooLongError(InvalidPromptError):
    """It has certainly more tokens than the model takes."""


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a chat. Which roles there are is up to the model's template."""

    role: str
    content: str


class Tokenizer:
    """The tokenizer and chat template of a prepared model folder."""

    def __init__(self, model_dir: Path) -> None:
        self.backend = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        # A tokenizer file may ask for both; a served prompt must be neither cut nor filled up.
        self.backend.no_truncation()
        self.backend.no_padding()
        self._config = _read_json(model_dir / "tokenizer_config.json")
        self.chat_template = self._load_template(model_dir)
        """None if the model has none."""
        self._special_ids = {id_ for id_, token in self.backend.get_added_tokens_decoder().items() if token.special}
        self._added = self._encode("", add_special_tokens=True)
        self._letter = self._encode("a", add_special_tokens=False)
        self.token_text = functools.lru_cache(_KNOWN_TEXTS)(self._text_of)
        self.bytes: dict[int, int] = self._byte_tokens()
        """Which byte each byte token stands for; empty unless the vocabulary falls back to bytes, as Llama 2's does."""
        self._longest_token = max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)  # characters
        self.max_model_len: int = _read_json(model_dir / "config.json").get("max_position_embeddings", 0)
        """The longest sequence that the model was made for; 0 if it does not say."""
        generation = _read_json(model_dir / "generation_config.json")
        self.sampling_defaults = {name: generation[name] for name in _SAMPLING_DEFAULTS if name in generation}
        """What the model's makers recommend, by the names of `SamplingParams`."""

    def encode(self, text: str, max_tokens: int = 0, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt.

        Args:
            max_tokens: a text that can't have so few is not tokenized; 0 is no limit.
            add_special_tokens: also those that the tokenizer puts around a text, such as BOS.

        Raises:
            InvalidPromptError: there are none, or certainly too many.
        """
        self.check_length(len(text), max_tokens)
        if not text:
            raise InvalidPromptError("the prompt is empty; send at least one character")
        token_ids = self._encode(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise InvalidPromptError("the prompt has no character that the model's vocabulary can express")
        return token_ids

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same for tokenizers that give the same ids to the same tokens: one can read what the other wrote."""
        vocabulary = sorted(self.backend.get_vocab(with_added_tokens=True).items(), key=lambda entry: entry[1])
        return hashlib.sha256(msgspec.json.encode(vocabulary)).hexdigest()

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def prompt_text(self, token_ids: list[int]) -> str:
        """The text of a prompt as its writer sent it: without the special tokens that `encode` puts before it."""
        return self.decode(token_ids[self.num_added(token_ids) :], skip_special_tokens=False)

    def num_added(self, token_ids: list[int]) -> int:
        """How many special tokens a prompt begins with that `encode` has put there."""
        return len(self._added) if token_ids[: len(self._added)] == self._added else 0

    def is_text(self, token_id: int) -> bool:
        """Whether a decoded text has something of this token: it is in the vocabulary, and not special."""
        return token_id not in self._special_ids and self.backend.id_to_token(token_id) is not None

    def has_token(self, token_id: int) -> bool:
        """Whether the vocabulary has a token of this id; a model's may reach beyond the tokenizer's."""
        return self.backend.id_to_token(token_id) is not None

    def special_id(self, text: str) -> int | None:
        """The id of a special token; None if this text is none."""
        token_id: int | None = self.backend.token_to_id(text) if text else None
        return token_id if token_id in self._special_ids else None

    def _text_of(self, token_id: int) -> str:
        """The text of a token within a text, also of a special one.

        At the start of a text many tokenizers drop the token's leading space.
        """
        before = self.decode(self._letter)
        return self.decode([*self._letter, token_id], skip_special_tokens=False)[len(before) :]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token's text, also where it is a part of a character."""
        if (byte := self.bytes.get(token_id)) is not None:
            return bytes((byte,))
        text = self.token_text(token_id)
        if _PART not in text:
            return text.encode()
        token: str = self.backend.id_to_token(token_id) or ""
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # it is no token of a byte-level vocabulary
            return text.encode()

    def _byte_tokens(self) -> dict[int, int]:
        ids = [self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        found = {token_id: byte for byte, token_id in enumerate(ids) if token_id is not None}
        # Not every tokenizer with tokens of these names reads them as bytes.
        return found if [self.decode([id_]) for id_, byte in found.items() if byte == ord("A")] == ["A"] else {}

    def encode_chat(self, messages_json: str, max_tokens: int = 0) -> list[int]:
        """Token ids of chat messages, given as JSON: `[{"role": "user", "content": "Hi"}]`.

        Raises:
            InvalidPromptError: they are not that, or certainly too long (`max_tokens` as of `encode`), or the model has
                no chat template or refuses them.
        """
        self.check_length(len(messages_json), max_tokens * _MAX_ESCAPE)
        try:
            messages = msgspec.json.decode(messages_json, type=list[ChatMessage])
        except msgspec.ValidationError as error:
            raise InvalidPromptError(f"messages: {error}") from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidPromptError(f"messages is not JSON: {error}") from None
        if max_tokens and len(messages) > max_tokens:
            raise InvalidPromptError(f"{len(messages)} messages; the model takes {max_tokens} tokens")
        if not messages:
            raise InvalidPromptError("messages is empty; send at least one message")
        return self.encode_messages(msgspec.to_builtins(messages), max_tokens)

    def encode_messages(self, messages: list[dict[str, Any]], max_tokens: int = 0) -> list[int]:
        """The same of messages that are checked already. Raises InvalidPromptError as `encode_chat`."""
        return self.encode_rendered(self.apply_chat_template(messages, max_tokens), max_tokens)

    def encode_rendered(self, text: str, max_tokens: int = 0) -> list[int]:
        """Token ids of a text that a chat template has written, with its special tokens.

        Raises:
            InvalidPromptError: they are certainly too many.
        """
        self.check_length(len(text), max_tokens)
        return self._encode(text, add_special_tokens=False)

    def check_length(self, num_characters: int, max_tokens: int) -> None:
        """Raises InvalidPromptError: a text of so many characters has certainly more tokens."""
        limit = max_tokens * self._longest_token
        if limit and num_characters > limit:
            raise PromptTooLongError(
                f"This model's maximum context length is {max_tokens} tokens, which have at most {limit} characters; "
                f"the prompt has {num_characters} characters"
            )

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= LONG_TEXT:
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        else:  # for a single text, tokenizers holds the GIL to the end
            (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = encoding.ids
        return token_ids

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        max_tokens: int = 0,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The prompt that the model was trained to see for these messages, up to where its answer begins.

        Args:
            max_tokens: as of `encode`; the text of more may be cut.
            variables: of the template, such as `tools`.
        """
        if self.chat_template is None:
            raise InvalidPromptError("this model has no chat template; send text_input instead of messages")
        try:
            limit = max_tokens * self._longest_token
            return self.chat_template.render(messages, limit, {"add_generation_prompt": True, **variables})
        except TemplateError as error:
            raise InvalidPromptError(str(error)) from None

    def _load_template(self, model_dir: Path) -> ChatTemplate | None:
        file = model_dir / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else self._config.get("chat_template")
        texts = {name: _token_text(self._config.get(name)) for name in _SPECIAL_TOKENS}
        known = {name: text for name, text in texts.items() if text is not None}
        return ChatTemplate(source, known) if source else None


def _token_text(token: Any) -> str | None:
    """A special token, which older tokenizer configs write as an object."""
    return token["content"] if isinstance(token, dict) else token


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
