"""Text and chat messages to token ids and back, light enough for Triton's stub processes: no torch, no transformers."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec
import tokenizers

# What chat templates may name. One that the model lacks is left out: it must print as nothing, not as "None".
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

_KNOWN_TEXTS = 65_536  # tokens whose text is remembered, at most
_MAX_ESCAPE = 6  # characters of JSON for one of its text, as \u00e9
LONG_TEXT = 16_384  # characters; tokenizing more takes so long that others should not wait for it


class InvalidPromptError(ValueError):
    """A prompt that can't be tokenized; the message is for the caller."""


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
        self._template = self._load_template(model_dir)
        self._special_tokens = {
            name: text for name in _SPECIAL_TOKENS if (text := _token_text(self._config.get(name))) is not None
        }
        self._special_ids = {id_ for id_, token in self.backend.get_added_tokens_decoder().items() if token.special}
        self._added = self._encode("", add_special_tokens=True)
        self._letter = self._encode("a", add_special_tokens=False)
        self.token_text = functools.lru_cache(_KNOWN_TEXTS)(self._text_of)
        self.bytes: dict[int, int] = self._byte_tokens()
        """Which byte each byte token stands for; empty unless the vocabulary falls back to bytes, as Llama 2's does."""
        self._longest_token = max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)  # characters
        self.max_model_len: int = _read_json(model_dir / "config.json").get("max_position_embeddings", 0)
        """The longest sequence that the model was made for; 0 if it does not say."""

    def encode(self, text: str, max_tokens: int = 0) -> list[int]:
        """Token ids of a prompt. `max_tokens`: a text that can't have so few is not tokenized; 0 is no limit.

        Raises:
            InvalidPromptError: there are none, or certainly too many.
        """
        self.check_length(len(text), max_tokens)
        if not text:
            raise InvalidPromptError("the prompt is empty; send at least one character")
        token_ids = self._encode(text, add_special_tokens=True)
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
        added = self._added if token_ids[: len(self._added)] == self._added else []
        return self.decode(token_ids[len(added) :], skip_special_tokens=False)

    def is_text(self, token_id: int) -> bool:
        """Whether a decoded text has something of this token: it is in the vocabulary, and not special."""
        return token_id not in self._special_ids and self.backend.id_to_token(token_id) is not None

    def _text_of(self, token_id: int) -> str:
        """The text of a token within a text, also of a special one.

        At the start of a text many tokenizers drop the token's leading space.
        """
        before = self.decode(self._letter)
        return self.decode([*self._letter, token_id], skip_special_tokens=False)[len(before) :]

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
        text = self.apply_chat_template(messages)
        self.check_length(len(text), max_tokens)
        # The template wrote the special tokens itself.
        return self._encode(text, add_special_tokens=False)

    def check_length(self, num_characters: int, max_tokens: int) -> None:
        """Raises InvalidPromptError: a text of so many characters has certainly more tokens."""
        limit = max_tokens * self._longest_token
        if limit and num_characters > limit:
            raise InvalidPromptError(
                f"the prompt has {num_characters} characters; the model takes at most {max_tokens} tokens, which have "
                f"no more than {limit}"
            )

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= LONG_TEXT:
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        else:  # for a single text, tokenizers holds the GIL to the end
            (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = encoding.ids
        return token_ids

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> str:
        """The prompt that the model was trained to see for these messages, up to where its answer begins."""
        if self._template is None:
            raise InvalidPromptError("this model has no chat template; send text_input instead of messages")
        try:
            # Tools and documents are none, but known: templates ask `tools is not none`.
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # whatever the template can't compute with in these messages
            raise InvalidPromptError(f"the model's chat template refuses the messages: {error}") from None

    def _load_template(self, model_dir: Path) -> jinja2.Template | None:
        file = model_dir / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else self._config.get("chat_template")
        if isinstance(source, list):  # several templates by name
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        return _environment().from_string(source) if source else None


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what to train on; for serving, the marked text is just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """The environment that chat templates are written for: that of transformers' apply_chat_template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which would reach the model."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _token_text(token: Any) -> str | None:
    """A special token, which older tokenizer configs write as an object."""
    return token["content"] if isinstance(token, dict) else token


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
