"""What the WebSocket needs from the rest of the gateway, and how the pipeline gives it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from tidewright import logs
from tidewright.resilience.errors import ModelError
from tidewright_gateway.auth import Authenticator
from tidewright_gateway.auth.callers import Caller
from tidewright_gateway.context import RequestContext
from tidewright_gateway.http import access_log
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.openai.protocol import CompletionRequest
from tidewright_gateway.pipeline import Pipeline
from tidewright_gateway.replicas.triton import Reply
from tidewright_gateway.tracing.context import Tracer
from tidewright_gateway.tracing.traces import Traces

PATH = "/v1/stream"

Request = ChatRequest | CompletionRequest
Kind = type[ChatRequest] | type[CompletionRequest]


class RunningRequest(Protocol):
    @property
    def num_choices(self) -> int:
        """Outputs that were asked for."""

    @property
    def usage_prompt(self) -> int:
        """Tokens of its prompts."""

    @property
    def served_by(self) -> str:
        """Who answers, as far as known: of use once the replies have ended."""

    @property
    def limited_by(self) -> str | None:
        """The limit that ended it early."""

    @property
    def replies(self) -> AsyncGenerator[tuple[int, Reply], None]:
        """Each with the index of its choice."""


class Backend(Protocol):
    async def authenticate(self, credential: str | None) -> Caller:
        """`credential`: as the Authorization header has it.

        Raises:
            ApiError: it is no key.
        """

    def run(
        self, kind: Kind, body: bytes, credential: str | None, request_id: str
    ) -> AbstractAsyncContextManager[RunningRequest]:
        """Until it is left; may be cancelled. Raises ApiError, also while the replies come."""


class _Running:
    def __init__(self, context: RequestContext, replies: AsyncGenerator[tuple[int, Reply], None]) -> None:
        self._context, self.replies = context, replies

    @property
    def num_choices(self) -> int:
        return len(self._context.generations)

    @property
    def usage_prompt(self) -> int:
        return self._context.num_prompt_tokens

    @property
    def served_by(self) -> str:
        return self._context.served_by

    @property
    def limited_by(self) -> str | None:
        return self._context.limited_by


class PipelineBackend:
    def __init__(
        self, pipeline: Pipeline, authenticator: Authenticator, tracer: Tracer, traces: Traces, metrics: Metrics
    ) -> None:
        self._pipeline, self._authenticator, self._metrics = pipeline, authenticator, metrics
        self._tracer, self._traces = tracer, traces

    async def authenticate(self, credential: str | None) -> Caller:
        return await self._authenticator.caller(credential)

    @asynccontextmanager
    async def run(
        self, kind: Kind, body: bytes, credential: str | None, request_id: str
    ) -> AsyncGenerator[RunningRequest, None]:
        context = RequestContext(request_id, self._tracer.begin(()), credential)
        context.record = self._traces.record(PATH)
        status = 499  # if it is left early
        self._metrics.began()
        self._metrics.stream("websocket", 1)
        try:
            with logs.about_request(context):
                async with self._pipeline.admit(context, kind, body, _as_it_is) as request:
                    _check_streams(request)
                    yield _Running(context, self._pipeline.execution.replies(context))
            status = 200
        except (ApiError, ModelError) as error:
            made = context.wording.told(error)
            status, context.error = made.status, made
            raise made from None
        finally:
            seconds = time.monotonic() - context.arrived_at
            self._metrics.ended(PATH, status, seconds, *context.end)
            self._metrics.stream("websocket", -1)
            self._traces.ended(context, "WEBSOCKET", PATH, status, seconds)
            client = access_log.client_address.get()
            access_log.write(context, client, access_log.WEBSOCKET, PATH, PATH, status, seconds)


async def _as_it_is(context: RequestContext, body: Request) -> Request:
    return body


def _check_streams(body: ChatRequest | CompletionRequest) -> None:
    if body.stream is False or body.stream_options is not None:
        param = "stream_options" if body.stream_options else "stream"
        raise invalid(f"{param}: the answer always streams, and ends with its usage; leave it out", param)
    if isinstance(body, CompletionRequest) and body.echo:
        raise invalid("echo: the client has the prompt; leave it out", "echo")
    if body.tool_use:
        message = "tools: the text comes here as the model writes it; use /v1/chat/completions for calls of tools"
        raise invalid(message, "tools")
