"""Text and chats to token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from tidewright.tokenization import InvalidPromptError, Tokenizer
from tidewright_gateway.errors import ApiError, invalid
from tidewright_gateway.protocol import Message

LONG_TEXT = 16_384  # characters; tokenizing more would hold up everybody, so a thread does it


class Prompts:
    """Raises ApiError for what can't be a prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    async def of_chat(self, messages: Sequence[Message]) -> list[int]:
        turns = [{"role": message.role, "content": message.text} for message in messages]
        length = sum(len(turn["content"]) for turn in turns)
        if length <= LONG_TEXT:
            return self._run(partial(self.tokenizer.encode_messages, turns), "messages")
        return await asyncio.to_thread(
            self._run, lambda: self._encode_long(self.tokenizer.apply_chat_template(turns), False), "messages"
        )

    async def of_text(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            if len(prompt) <= LONG_TEXT:
                return self._run(partial(self.tokenizer.encode, prompt), "prompt")
            return await asyncio.to_thread(self._run, partial(self._encode_long, prompt, True), "prompt")
        if not prompt:
            raise invalid("prompt has no tokens; send at least one", "prompt")
        limit = self.tokenizer.backend.get_vocab_size()
        if not all(0 <= token_id < limit for token_id in prompt):
            raise invalid(f"prompt: token ids must be from 0 to {limit - 1}", "prompt")
        return prompt

    def _encode_long(self, text: str, add_special_tokens: bool) -> list[int]:
        """As Tokenizer has it, but a batch: for a single text, tokenizers holds the GIL to the end."""
        (encoding,) = self.tokenizer.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if not encoding.ids:
            raise InvalidPromptError("the prompt has no character that the model's vocabulary can express")
        token_ids: list[int] = encoding.ids
        return token_ids

    def _run(self, encode: Callable[[], list[int]], param: str) -> list[int]:
        try:
            return encode()
        except InvalidPromptError as error:
            raise ApiError(422, str(error), code="invalid_prompt", param=param) from None
