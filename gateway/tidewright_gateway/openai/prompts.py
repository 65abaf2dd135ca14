"""Text and chats to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from tidewright.tokenization import LONG_TEXT, InvalidPromptError, Tokenizer
from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.openai.protocol import Message

MANY_MESSAGES = 64  # rendering more takes as long as tokenizing LONG_TEXT


class Prompts:
    """Raises ApiError for what can't be a prompt. `limit`: tokens; a text that has certainly more is not tokenized."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    async def of_chat(self, messages: Sequence[Message], limit: int) -> list[int]:
        turns = [{"role": message.role, "content": message.text} for message in messages]
        length = sum(len(turn["content"]) for turn in turns)
        encode = partial(self.tokenizer.encode_messages, turns, limit)
        return await self._run(encode, length, limit, "messages", len(turns) > MANY_MESSAGES)

    async def of_text(self, prompt: str | list[int], limit: int) -> list[int]:
        if isinstance(prompt, str):
            return await self._run(partial(self.tokenizer.encode, prompt, limit), len(prompt), limit, "prompt")
        self.check_ids(prompt, "prompt")
        return prompt

    def check_ids(self, ids: list[int], param: str) -> None:
        if not ids:
            raise invalid(f"{param} has no tokens; send at least one", param)
        size = self.tokenizer.backend.get_vocab_size()
        if not all(0 <= token_id < size for token_id in ids):
            raise invalid(f"{param}: token ids must be from 0 to {size - 1}", param)

    async def _run(
        self, encode: Callable[[], list[int]], length: int, limit: int, param: str, is_long: bool = False
    ) -> list[int]:
        """`length`: of the text, in characters."""
        try:
            self.tokenizer.check_length(length, limit)
        except InvalidPromptError as error:
            raise invalid(str(error), param, "context_length_exceeded") from None
        try:
            return await asyncio.to_thread(encode) if is_long or length > LONG_TEXT else encode()
        except InvalidPromptError as error:
            raise ApiError(422, str(error), code="invalid_prompt", param=param) from None
