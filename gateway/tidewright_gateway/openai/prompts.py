"""Text and chats to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tidewright.tokenization import LONG_TEXT, InvalidPromptError, PromptTooLongError, Tokenizer
from tidewright_gateway.openai.chat import Chat, ChatRequest
from tidewright_gateway.openai.dialect import Dialect, describe
from tidewright_gateway.openai.errors import invalid
from tidewright_gateway.openai.protocol import CompletionRequest, GenerationBody

MANY_MESSAGES = 64  # rendering more takes as long as tokenizing LONG_TEXT
_END = 32  # characters of a rendered prompt that say how an answer begins
T = TypeVar("T")


@dataclass(frozen=True)
class ChatPrompt:
    token_ids: list[int]
    end: str = ""
    """The last characters of its text."""


@dataclass(frozen=True)
class Tokenized:
    """The prompts of a request."""

    prompts: list[list[int]]
    echoes: Sequence[str] = ()
    """The text of each, if it is to be returned."""
    end: str = ""
    """The last characters of a chat's text."""


class Prompts:
    """Raises ApiError for what can't be a prompt. `limit`: tokens; a text that has certainly more is not tokenized."""

    def __init__(self, tokenizer: Tokenizer, dialect: Dialect) -> None:
        self.tokenizer, self.dialect = tokenizer, dialect

    async def of_request(self, request: GenerationBody, limit: int) -> Tokenized:
        """Each prompt leaves room for an answer."""
        if isinstance(request, ChatRequest):
            chat = await self.of_chat(request, limit)
            (prompt,) = _fitting([chat.token_ids], request.truncate_prompt_tokens, limit, "messages")
            return Tokenized([prompt], end=chat.end)
        assert isinstance(request, CompletionRequest)
        texts, most = request.prompts, request.truncate_prompt_tokens
        if not texts:
            raise invalid("prompt is an empty list; send at least one prompt", "prompt")
        adds = request.add_special_tokens is not False
        places = places_of(request.prompt, "prompt")
        prompts = [
            await self.of_text(text, limit, place, add_special_tokens=adds)
            for text, place in zip(texts, places, strict=True)
        ]
        prompts = _fitting(prompts, most, limit, *places)
        if not request.echo:
            return Tokenized(prompts)
        decode, pairs = self.tokenizer.prompt_text, zip(texts, prompts, strict=True)
        return Tokenized(
            prompts, [text if isinstance(text, str) and most is None else decode(prompt) for text, prompt in pairs]
        )

    async def of_chat(self, chat: Chat, limit: int) -> ChatPrompt:
        functions, variables = chat.offered, chat.variables
        turns = self.dialect.turns([message.turn() for message in chat.messages], functions)
        if functions and self.dialect.knows_tools:
            variables["tools"] = [describe(function) for function in functions]
        length = sum(len(turn["content"]) for turn in turns)
        is_long = len(turns) > MANY_MESSAGES or bool(functions)
        render = partial(self._render, turns, limit, variables, bool(chat.continue_final_message))
        return await self._run(render, length, limit, "messages", is_long)

    def _render(
        self, turns: list[dict[str, Any]], limit: int, variables: dict[str, Any], continues: bool
    ) -> ChatPrompt:
        text = self.tokenizer.apply_chat_template(turns, limit, variables)
        if continues:
            text = _up_to_last(text, turns[-1]["content"].rstrip() if turns else "")
        return ChatPrompt(self.tokenizer.encode_rendered(text, limit), text[-_END:])

    async def of_text(
        self, prompt: str | list[int], limit: int, param: str = "prompt", *, add_special_tokens: bool = True
    ) -> list[int]:
        if isinstance(prompt, str):
            encode = partial(self.tokenizer.encode, prompt, limit, add_special_tokens=add_special_tokens)
            return await self._run(encode, len(prompt), limit, param)
        self.check_ids(prompt, param)
        return prompt

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        if not ids:
            raise invalid(f"{param} has no tokens; send at least one", param)
        size = self.tokenizer.backend.get_vocab_size()
        if not all(0 <= token_id < size for token_id in ids):
            raise invalid(f"{param}: token ids must be from 0 to {size - 1}", param)

    async def _run(self, encode: Callable[[], T], length: int, limit: int, param: str, is_long: bool = False) -> T:
        """`length`: of the text, in characters."""
        try:
            self.tokenizer.check_length(length, limit)
            return await asyncio.to_thread(encode) if is_long or length > LONG_TEXT else encode()
        except PromptTooLongError as error:
            raise invalid(_told(error, param), param, "context_length_exceeded") from None
        except InvalidPromptError as error:
            raise invalid(_told(error, param), param, "invalid_prompt") from None


def _told(error: Exception, place: str) -> str:
    """With the place of one of several texts, behind the words that clients look for."""
    return f"{error} ({place})" if "." in place else str(error)


def places_of(given: Any, param: str) -> list[str]:
    """Of each text of a field that is a text, or a list of texts; a text may be given as its token ids."""
    is_list = isinstance(given, list) and not (given and isinstance(given[0], int))
    return [f"{param}.{number}" for number in range(len(given))] if is_list else [param]


def _fitting(prompts: list[list[int]], most: int | None, limit: int, *places: str) -> list[list[int]]:
    """Each with its last `most` tokens at most; -1: as many as leave room for an answer. `places`: of the prompts."""
    if most is not None:
        if most != -1 and not 1 <= most < limit:
            raise invalid(f"truncate_prompt_tokens must be -1, or from 1 to {limit - 1}", "truncate_prompt_tokens")
        most = limit - 1 if most == -1 else most
        prompts = [prompt[-most:] for prompt in prompts]
    for prompt, place in zip(prompts, places, strict=True):
        if len(prompt) >= limit:
            # Clients look for the first words.
            message = f"This model's maximum context length is {limit} tokens, of which the answer needs at least one; "
            told = place if "." in place else "the prompt"
            raise invalid(f"{message}{told} has {len(prompt)} tokens", place, "context_length_exceeded")
    return prompts


def _up_to_last(text: str, content: str) -> str:
    """The prompt up to the end of the last message, which the answer continues. Raises InvalidPromptError."""
    at = text.rfind(content)
    if not content or at < 0:
        raise InvalidPromptError(
            "continue_final_message needs a last message whose text the model's chat template writes as it is"
        )
    return text[: at + len(content)]
