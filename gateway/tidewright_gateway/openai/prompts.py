"""Text and chats to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from tidewright.tokenization import LONG_TEXT, InvalidPromptError, Tokenizer
from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.openai.protocol import Message


class Prompts:
    """Raises ApiError for what can't be a prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    async def of_chat(self, messages: Sequence[Message]) -> list[int]:
        turns = [{"role": message.role, "content": message.text} for message in messages]
        length = sum(len(turn["content"]) for turn in turns)
        return await self._run(partial(self.tokenizer.encode_messages, turns), length, "messages")

    async def of_text(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await self._run(partial(self.tokenizer.encode, prompt), len(prompt), "prompt")
        if not prompt:
            raise invalid("prompt has no tokens; send at least one", "prompt")
        limit = self.tokenizer.backend.get_vocab_size()
        if not all(0 <= token_id < limit for token_id in prompt):
            raise invalid(f"prompt: token ids must be from 0 to {limit - 1}", "prompt")
        return prompt

    async def _run(self, encode: Callable[[], list[int]], length: int, param: str) -> list[int]:
        """`length`: of the text, in characters."""
        try:
            return await asyncio.to_thread(encode) if length > LONG_TEXT else encode()
        except InvalidPromptError as error:
            raise ApiError(422, str(error), code="invalid_prompt", param=param) from None
