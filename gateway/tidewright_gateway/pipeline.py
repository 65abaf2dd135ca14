"""From a request of the API to the replies of its generations."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from tidewright.resilience.deadline import Deadline
from tidewright.resilience.degradation import Route
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import SamplingParams
from tidewright_gateway.admission.ladder import Admission
from tidewright_gateway.admission.limits import Limiter, subjects_of
from tidewright_gateway.auth.callers import Caller
from tidewright_gateway.cache.responses import CachePolicy, ResponseCache, cache_key, is_repeatable
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.context import RequestContext
from tidewright_gateway.http.tracing import TraceContext
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.openai.prompts import Prompts
from tidewright_gateway.openai.protocol import ChatRequest, CompletionRequest
from tidewright_gateway.replicas.failover import Failover, Generation
from tidewright_gateway.replicas.triton import Reply

_DEFAULT_COMPLETION = 16  # tokens, as OpenAI's


# The decoder can't answer, whoever's fault that is: the fallback is asked, if nothing was handed on yet.
_FALLS_BACK = (
    Outcome.UNAVAILABLE,
    Outcome.STALLED,
    Outcome.STUB_DIED,
    Outcome.ENGINE_FAILED,
    Outcome.ENGINE_KILLED,
    Outcome.FIRST_TOKEN_TIMEOUT,
    Outcome.OVERLOADED,
)


class Pipeline:
    def __init__(
        self,
        settings: GatewaySettings,
        cluster: Failover,
        prompts: Prompts,
        limiter: Limiter,
        admission: Admission,
        cache: ResponseCache,
        metrics: Metrics,
    ) -> None:
        self._settings, self._cluster, self._prompts, self._metrics = settings, cluster, prompts, metrics
        self._limiter, self._admission, self._cache = limiter, admission, cache

    def check_model(self, name: str | None) -> None:
        """Raises ApiError: another model than ours is asked for."""
        served = self._settings.model_name
        if name is not None and name != served:
            message = f"there is no model {name!r} here; this gateway serves {served!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    async def open(
        self,
        body: ChatRequest | CompletionRequest,
        caller: Caller,
        request_id: str,
        arrived_at: float,
        trace: TraceContext,
        policy: CachePolicy = CachePolicy.USE,
    ) -> RequestContext:
        """Whoever opens it must `close` it.

        Raises:
            ApiError: it can't be done as asked.
        """
        self.check_model(body.model)
        n = 1 if body.n is None else body.n
        shown: list[str | list[int]] = []
        if isinstance(body, ChatRequest):
            self._check_size(1, n)
            prompts = [await self._prompts.of_chat(body.messages)]
            sampling = body.sampling(max(self._cluster.max_model_len - len(prompts[0]), 1))
        else:
            texts = body.prompts
            if not texts:
                raise invalid("prompt is an empty list; send at least one prompt", "prompt")
            self._check_size(len(texts), n)
            sampling = body.sampling(_DEFAULT_COMPLETION)
            prompts = [await self._prompts.of_text(text) for text in texts]
            shown = texts if body.echo else []
        self._check_lengths(prompts)
        given = self._admission.treatment(sampling.max_tokens)
        repeatable, is_shortened = is_repeatable(sampling), given.max_tokens < sampling.max_tokens
        if is_shortened:
            shorter = min(sampling.min_tokens, given.max_tokens)
            sampling = msgspec.structs.replace(sampling, max_tokens=given.max_tokens, min_tokens=shorter)
        tasks = self._tasks(request_id, prompts, sampling, n, arrived_at, trace)
        decode = self._prompts.tokenizer.decode
        echoes = [text if isinstance(text, str) else decode(text) for text in shown for _ in range(n)]
        num_prompt_tokens = sum(map(len, prompts))
        cost = num_prompt_tokens + len(tasks) * sampling.max_tokens
        reservation = await self._limiter.reserve(subjects_of(caller, body.user, self._settings), cost)
        return RequestContext(
            request_id,
            trace.trace_id,
            caller,
            tasks,
            num_prompt_tokens,
            arrived_at,
            echoes,
            policy,
            repeatable,
            given,
            is_shortened,
            reservation,
        )

    def _check_size(self, num_prompts: int, n: int) -> None:
        if n < 1:
            raise invalid("n must be at least 1", "n")
        most = self._settings.max_choices
        if num_prompts * n > most:
            raise invalid(f"{num_prompts} prompts times n = {n} is more than {most} (max_choices)", "n")

    def _check_lengths(self, prompts: Sequence[list[int]]) -> None:
        longest, limit = max(map(len, prompts)), self._cluster.max_model_len
        if longest >= limit:
            message = f"the prompt has {longest} tokens; with its answer the model's context takes {limit}"
            raise invalid(message, code="context_length_exceeded")

    def _tasks(
        self,
        request_id: str,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        n: int,
        arrived_at: float,
        trace: TraceContext,
    ) -> list[Generation]:
        """`n` of each prompt; the same seed, one more for each of them."""
        seed = sampling.seed
        if seed is None and sampling.temperature > 0:
            seed = secrets.randbits(62)  # so that another replica can go on as this one would have
        longest = self._settings.request_timeout
        deadline = Deadline.after(longest if sampling.timeout is None else min(sampling.timeout, longest), arrived_at)
        tasks: list[Generation] = []
        for prompt in prompts:
            for number in range(n):
                own = sampling if seed is None else msgspec.structs.replace(sampling, seed=(seed + number) % 2**63)
                name, logprobs = f"{request_id}-{len(tasks)}", sampling.logprobs is not None
                tasks.append(Generation(name, prompt, own, deadline, logprobs, trace.metadata))
        return tasks

    async def close(self, work: RequestContext, num_tokens: int) -> None:
        """It has ended, however it did; the second time nothing happens. `num_tokens`: what it generated."""
        if work.num_tokens is not None:
            return
        work.num_tokens = num_tokens
        self._metrics.tokens(work.num_prompt_tokens, num_tokens)
        await self._limiter.settle(work.reservation, work.num_prompt_tokens + num_tokens)

    async def replies(self, work: RequestContext) -> AsyncGenerator[tuple[int, Reply], None]:
        """Replies of all generations as they come, each with its index; leaving early ends them.

        Raises:
            ModelError: one of them failed; the others are given up.
        """
        if len(work.tasks) == 1:
            async with aclosing(self._replies_of(work.tasks[0], work)) as replies:
                async for reply in replies:
                    yield 0, reply
            return
        arrived: asyncio.Queue[tuple[int, Reply] | Exception | None] = asyncio.Queue(maxsize=len(work.tasks))

        async def forward(index: int) -> None:
            try:
                async with aclosing(self._replies_of(work.tasks[index], work)) as replies:
                    async for reply in replies:
                        await arrived.put((index, reply))
                await arrived.put(None)
            except Exception as error:
                await arrived.put(error)

        jobs = [asyncio.create_task(forward(index)) for index in range(len(work.tasks))]
        running = len(jobs)
        try:
            while running:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    async def _replies_of(self, task: Generation, work: RequestContext) -> AsyncGenerator[Reply, None]:
        key: bytes | None = None
        if work.is_repeatable and work.treatment.route is Route.DECODER:
            key = cache_key(work.caller, self._settings.model_name, task.prompt, task.sampling, task.logprobs)
        state, replies = self._cache.open(
            key, lambda: self._run(task, work), work.policy, lambda: task.model == "decoder"
        )
        work.cache_states.append(state)
        self._metrics.cache(state)
        async with aclosing(replies):
            async for reply in replies:
                work.models.add(reply.served_by)
                if reply.token_ids and work.first_token_after is None:
                    work.first_token_after = time.monotonic() - work.arrived_at
                    self._metrics.first_token(work.first_token_after)
                yield reply

    async def _run(self, task: Generation, work: RequestContext) -> AsyncGenerator[Reply, None]:
        """At a replica, once it is its turn."""
        priority = work.caller.priority + task.sampling.priority
        self._metrics.asked(time.monotonic() - work.arrived_at)
        async with self._admission.place(task, work.caller.key_id, priority):
            async with aclosing(self._ask(task, work.treatment.route)) as replies:
                async for reply in replies:
                    yield reply

    async def _ask(self, task: Generation, route: Route) -> AsyncGenerator[Reply, None]:
        """The decoder, and where it can't answer the fallback; by `route` the other way round."""
        order = [self._cluster.generate, self._cluster.fall_back]
        if not self._settings.fallback:
            order = order[:1]
        elif route is Route.FALLBACK:
            order.reverse()
        first: ModelError | None = None
        for ask in order:
            try:
                async with aclosing(ask(task)) as replies:
                    async for reply in replies:
                        yield reply
                return
            except ModelError as error:
                first = first or error
                if ask is order[-1] or task.delivered or error.outcome not in _FALLS_BACK:
                    raise first from None
