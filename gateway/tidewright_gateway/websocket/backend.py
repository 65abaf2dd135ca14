"""What the WebSocket needs from the rest of the gateway, and how the service gives it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from tidewright.resilience.errors import ModelError
from tidewright_gateway.auth import Authenticator
from tidewright_gateway.auth.callers import Caller
from tidewright_gateway.context import RequestContext
from tidewright_gateway.http import access_log
from tidewright_gateway.http.tracing import Tracer
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.openai.errors import of_model
from tidewright_gateway.openai.protocol import ChatRequest, CompletionRequest
from tidewright_gateway.pipeline import Pipeline
from tidewright_gateway.replicas.triton import Reply

PATH = "/v1/stream"


class RunningRequest(Protocol):
    """A request that runs, until its replies end or are closed."""

    @property
    def usage_prompt(self) -> int:
        """Tokens of its prompts."""

    @property
    def served_by(self) -> str:
        """Who answers, as far as known: of use once the replies have ended."""

    @property
    def replies(self) -> AsyncGenerator[tuple[int, Reply], None]:
        """Each with the index of its choice. Raises ApiError or ModelError."""


class Backend(Protocol):
    async def authenticate(self, token: str | None) -> Caller:
        """`token`: of the handshake's Authorization header or of `open`.

        Raises:
            ApiError: it is no key.
        """

    async def open(self, body: ChatRequest | CompletionRequest, caller: Caller, request_id: str) -> RunningRequest:
        """May be cancelled.

        Raises:
            ApiError: the request is refused.
        """


class _Running:
    def __init__(self, work: RequestContext, service: Pipeline, metrics: Metrics) -> None:
        self.usage_prompt = work.num_prompt_tokens
        self._work, self._service, self._metrics = work, service, metrics
        self.replies = self._replies()

    @property
    def served_by(self) -> str:
        return self._work.served_by

    async def _replies(self) -> AsyncGenerator[tuple[int, Reply], None]:
        status, generated = 499, 0  # if it is closed early
        self._metrics.began()
        try:
            async with aclosing(self._service.replies(self._work)) as replies:
                async for index, reply in replies:
                    generated += len(reply.token_ids)
                    yield index, reply
            status = 200
        except ModelError as error:
            made = of_model(error)
            status = made.status
            raise made from None
        finally:
            work, seconds = self._work, time.monotonic() - self._work.arrived_at
            self._metrics.ended(PATH, status, seconds)
            await self._service.close(work, generated)
            if access_log.is_on():
                head = {"request_id": work.request_id, "trace_id": work.trace_id, "method": "WEBSOCKET", "path": PATH}
                access_log.write({**head, "status": status, "seconds": round(seconds, 4), **work.facts})


class PipelineBackend:
    def __init__(self, service: Pipeline, authenticator: Authenticator, tracer: Tracer, metrics: Metrics) -> None:
        self._service, self._authenticator, self._tracer, self._metrics = service, authenticator, tracer, metrics

    async def authenticate(self, token: str | None) -> Caller:
        return await self._authenticator.caller(f"Bearer {token}" if token else None)

    async def open(self, body: ChatRequest | CompletionRequest, caller: Caller, request_id: str) -> RunningRequest:
        work = await self._service.open(body, caller, request_id, time.monotonic(), self._tracer.begin(()))
        return _Running(work, self._service, self._metrics)
