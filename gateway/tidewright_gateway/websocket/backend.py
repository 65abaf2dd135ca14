"""What the WebSocket needs from the rest of the gateway, and the plain form of it: straight to the replicas."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from tidewright.failsafe.models import ModelError
from tidewright_gateway.callers import ANONYMOUS, Caller
from tidewright_gateway.cluster import Cluster
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.errors import ApiError, invalid, of_model
from tidewright_gateway.generation import Generator, Prompts, Work, make_work
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.protocol import ChatRequest, CompletionRequest
from tidewright_gateway.triton import Reply

PATH = "/v1/stream"
_DEFAULT_COMPLETION = 16  # tokens, as OpenAI's


class OpenGeneration(Protocol):
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

    async def open(self, body: ChatRequest | CompletionRequest, caller: Caller, request_id: str) -> OpenGeneration:
        """May be cancelled.

        Raises:
            ApiError: the request is refused.
        """


class _Direct:
    def __init__(self, work: Work, generator: Generator, metrics: Metrics) -> None:
        self.usage_prompt = work.usage_prompt
        self._work, self._generator, self._metrics = work, generator, metrics
        self.replies = self._replies()

    @property
    def served_by(self) -> str:
        return ", ".join(sorted({task.served_by[-1] for task in self._work.tasks if task.served_by}))

    async def _replies(self) -> AsyncGenerator[tuple[int, Reply], None]:
        status = 499  # if it is closed early
        self._metrics.began()
        try:
            async with aclosing(self._generator.replies(self._work)) as replies:
                async for pair in replies:
                    yield pair
            status = 200
        except ModelError as error:
            made = of_model(error)
            status = made.status
            raise made from None
        finally:
            self._metrics.ended(PATH, status, time.monotonic() - self._work.arrived_at)
            self._metrics.tokens(self.usage_prompt, sum(len(task.delivered) for task in self._work.tasks))


class DirectBackend:
    """Asks for no keys and limits nothing."""

    def __init__(self, settings: GatewaySettings, cluster: Cluster, prompts: Prompts, metrics: Metrics) -> None:
        self._settings, self._cluster, self._prompts, self._metrics = settings, cluster, prompts, metrics
        self._generator = Generator(cluster, metrics)

    async def authenticate(self, token: str | None) -> Caller:
        return ANONYMOUS

    async def open(self, body: ChatRequest | CompletionRequest, caller: Caller, request_id: str) -> OpenGeneration:
        arrived_at = time.monotonic()
        if body.model != self._settings.model_name:
            message = f"there is no model {body.model!r} here; this gateway serves {self._settings.model_name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        n = 1 if body.n is None else body.n
        if n < 1:
            raise invalid("n must be at least 1", "n")
        longest = self._cluster.max_model_len
        if isinstance(body, ChatRequest):
            prompts = [await self._prompts.of_chat(body.messages)]
            sampling = body.sampling(max(longest - len(prompts[0]), 1))
        else:
            prompts = [await self._prompts.of_text(prompt) for prompt in body.prompts]
            if not prompts:
                raise invalid("prompt is an empty list; send at least one prompt", "prompt")
            sampling = body.sampling(_DEFAULT_COMPLETION)
        if len(prompts) * n > self._settings.max_choices:
            message = f"{len(prompts)} prompts times n = {n} is more than {self._settings.max_choices} (max_choices)"
            raise invalid(message, "n")
        work = make_work(
            request_id,
            prompts,
            sampling,
            n,
            max_model_len=longest,
            longest=self._settings.request_timeout,
            arrived_at=arrived_at,
        )
        return _Direct(work, self._generator, self._metrics)
