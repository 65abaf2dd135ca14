"""The answer to one Responses request: the Response object, or the typed events of its stream."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.answers import Answer, Choice, Part
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.logprobs import TokenEntries
from tidewright_gateway.openai.prompts import Prompts
from tidewright_gateway.openai.responses.choice import ResponseChoice
from tidewright_gateway.openai.responses.description import Description
from tidewright_gateway.openai.responses.events import EventLog
from tidewright_gateway.openai.responses.names import as_sent

_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
"""OpenAI's, by status; all others are server_error."""
_LAST_EVENT = {"completed": "response.completed", "failed": "response.failed"}


class ResponsesAnswer(Answer):
    def __init__(
        self,
        context: RequestContext,
        request: ChatRequest,
        prompts: Prompts,
        description: Description,
        keep: Callable[[ResponsesAnswer], Awaitable[None]] | None,
    ) -> None:
        """`keep`: stores it, once it has ended; None if nothing is to be stored."""
        super().__init__(context)
        self._request, self._prompts, self._description, self._keep = request, prompts, description, keep
        self._choice: ResponseChoice | None = None
        self._log = EventLog(description.id, is_streamed=bool(request.stream))
        self._error: dict[str, str] | None = None
        self._ended_at: int | None = None
        self.status = "in_progress"

    @property
    def id(self) -> str:
        return self._description.id

    @property
    def is_over(self) -> bool:
        """It has ended: nothing can change it any more."""
        return self._ended_at is not None

    def choice(self, index: int, *, is_streamed: bool) -> Choice:
        made = self._prompts.dialect.choice(self._context, self._request.tool_use, index, keeps_tokens=False)
        response = self.response()
        self._log.tell("response.created", response=response)
        self._log.tell("response.in_progress", response=response)
        num_logprobs = self._request.num_logprobs()
        entries = None if num_logprobs is None else TokenEntries(self._prompts.tokenizer, num_logprobs)
        self._choice = ResponseChoice.of(made, self._log, entries)
        return self._choice

    def response(self) -> dict[str, Any]:
        """The Response object, as of now."""
        choice = self._choice
        return {
            **self._description.fields,
            "status": self.status,
            "completed_at": self._ended_at if self.status == "completed" else None,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "output": choice.output.items() if choice else [],
            "usage": self._usage(choice.num_reasoning_tokens) if choice and self.status != "in_progress" else None,
            **self._extras(),
        }

    def whole(self, choices: Sequence[Choice]) -> bytes:
        self._end()
        return msgspec.json.encode(self.response())

    def piece(self, choice: Choice, part: Part) -> bytes:
        return self._log.taken()

    def closing(self, choices: Sequence[Choice]) -> bytes:
        self._end()
        return self._last()

    def failure(self, error: ApiError) -> bytes:
        error = as_sent(error)
        if self._choice:
            self._choice.output.cut()
        if self.status != "cancelled":
            self._log.tell("error", code=error.code, message=str(error), param=error.param)
            self.status = "failed"
            self._error = {"code": _ERROR_CODES.get(error.status, "server_error"), "message": str(error)}
        self._ended_at = int(time.time())
        return self._last()

    async def settle(self) -> None:
        if self._keep and self.is_over:
            await self._keep(self)

    def cancel(self) -> None:
        """Says that it is cancelled; whoever calls this ends it."""
        self.status = "cancelled"

    def forget(self) -> None:
        """It is not stored."""
        self._keep = None

    def _end(self) -> None:
        assert self._choice
        self.status = "incomplete" if self._choice.finish_reason == "length" else "completed"
        self._ended_at = int(time.time())

    def _last(self) -> bytes:
        self._log.tell(_LAST_EVENT.get(self.status, "response.incomplete"), response=self.response())
        return self._log.taken()

    def _usage(self, num_reasoning: int) -> dict[str, Any]:
        prompt, output = self._context.num_prompt_tokens, self._context.num_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self._context.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": num_reasoning},
            "total_tokens": prompt + output,
        }

    def _extras(self) -> dict[str, Any]:
        """Fields that OpenAI does not have."""
        ended_by = self._choice.ended_by if self._choice else None
        found: dict[str, Any] = {"served_by": self._context.served_by}
        if ended_by:
            found["ended_by"] = ended_by
        if self._context.limited_by:
            found["limited_by"] = self._context.limited_by
        return found
