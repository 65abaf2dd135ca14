"""What follows the admission of a request (pipeline.py): queue → place → generate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Container
from contextlib import aclosing
from dataclasses import replace

from tidewright.resilience.degradation import Route
from tidewright.resilience.errors import ModelError
from tidewright_gateway.admission.limits import Limiter
from tidewright_gateway.admission.queue import priority_class
from tidewright_gateway.admission.smaller_variant import SERVED_BY
from tidewright_gateway.cache.joined_run import JoinedRun
from tidewright_gateway.cache.responses import CacheState, Replies, ResponseCache, cache_key
from tidewright_gateway.context import RequestContext
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.replicas.failover import Generation, timed_out
from tidewright_gateway.replicas.triton import Reply

EMBEDDED_AT_ONCE = 64  # prompts of one request, at most


class Execution:
    """`running`: the requests that have not settled yet."""

    def __init__(
        self,
        queue_timeout: float,
        limiter: Limiter,
        cache: ResponseCache,
        metrics: Metrics,
        running: Container[RequestContext],
    ) -> None:
        self._queue_timeout, self._limiter, self._cache, self._metrics = queue_timeout, limiter, cache, metrics
        self._running = running

    async def replies(self, context: RequestContext) -> AsyncGenerator[tuple[int, Reply], None]:
        """Yields replies of all generations as they arrive, each with its index. Closing it early ends them.

        Raises:
            ModelError: one of them failed; the others are cancelled.
        """
        if len(context.generations) == 1:
            async with aclosing(self._source(context, context.generations[0])) as replies:
                async for reply in replies:
                    self._note(context, 0, reply)
                    yield 0, reply
            return
        arrived: asyncio.Queue[tuple[int, Reply] | Exception | None] = asyncio.Queue(maxsize=len(context.generations))

        async def forward(index: int) -> None:
            try:
                async with aclosing(self._source(context, context.generations[index])) as replies:
                    async for reply in replies:
                        await arrived.put((index, reply))
                await arrived.put(None)
            except Exception as error:
                await arrived.put(error)

        jobs = [asyncio.create_task(forward(index)) for index in range(len(context.generations))]
        running = len(jobs)
        try:
            while running:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    self._note(context, *item)
                    yield item
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    def _note(self, context: RequestContext, index: int, reply: Reply) -> None:
        is_first = context.first_token_after is None
        context.take(index, reply)
        if is_first and context.first_token_after is not None:
            self._metrics.first_token(context.first_token_after)

    def _source(self, context: RequestContext, generation: Generation) -> Replies:
        """The replies of a generation, from the cache or an identical running one if possible."""
        key: bytes | None = None
        if context.is_repeatable and context.route is Route.DECODER and not context.is_smaller:
            model = context.served.name
            if adapter := context.adapter:  # another one may have had this name before
                model += f"\n{adapter.path}\n{adapter.at}"
            key = cache_key(context.caller, model, generation.prompt, generation.sampling, generation.logprobs)
        began = time.monotonic()

        def run() -> AsyncGenerator[Reply, None]:
            return self._generate(context, generation, began)

        state, replies = self._cache.open(
            key,
            run,
            context.policy,
            lambda: generation.model == "decoder" and not context.limited_by,
            generation.sampling.ttft_target,
        )
        context.cache_states.append(state)
        self._metrics.cache(state)
        if state in (CacheState.MISS, CacheState.BYPASS):
            self._metrics.asked(began - context.arrived_at)
        return JoinedRun(replies, generation, run) if state is CacheState.SHARED else replies

    async def _generate(
        self, context: RequestContext, generation: Generation, since: float
    ) -> AsyncGenerator[Reply, None]:
        """Queues, then runs the generation on a replica. `since`: when it began to wait (time.monotonic())."""
        began, priority = time.monotonic(), generation.sampling.priority
        until = min(since + self._queue_timeout, generation.deadline.at)
        try:
            place = await context.served.queue.enter(context.caller.key_id, priority, until, context.caller.weight)
        except ModelError as error:
            raise (timed_out(error) if generation.deadline.expired(time.monotonic()) else error) from None
        finally:
            waited = time.monotonic() - began
            self._metrics.queued(priority_class(priority), waited)
            context.queued_for = max(context.queued_for or 0.0, waited)
            generation.record.took("queue", began, generation.index)
        try:
            async with aclosing(context.served.failover.generate(generation, context.route)) as replies:
                async for reply in replies:
                    if context.is_smaller:
                        reply = replace(reply, served_by=SERVED_BY)
                    if context.growth and not reply.finish_reason and await self._is_over(context, reply):
                        yield replace(reply, finish_reason="length", is_limited=True)
                        return
                    yield reply
        finally:
            place.leave()

    async def embeddings(self, context: RequestContext) -> list[bytes]:
        """Of all its generations, in their order. Cancelling it ends them.

        Raises:
            ModelError: one of them failed; the others are cancelled.
        """
        found, pending = [b""] * len(context.generations), enumerate(context.generations)
        self._metrics.asked(time.monotonic() - context.arrived_at)

        async def work() -> None:
            for index, generation in pending:
                async with aclosing(self._generate(context, generation, time.monotonic())) as replies:
                    async for reply in replies:
                        self._note(context, index, reply)
                        found[index] = reply.embedding or b""

        # No more than are computed at once, so that a long list alone does not fill the queue.
        width = max(min(len(context.generations), EMBEDDED_AT_ONCE, context.served.queue.capacity), 1)
        jobs = [asyncio.create_task(work()) for _ in range(width)]
        try:
            await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
        return found

    async def _is_over(self, context: RequestContext, reply: Reply) -> bool:
        """Whether the caller's limits allow nothing after this reply."""
        used = context.num_prompt_tokens + context.num_tokens + len(reply.token_ids)
        # A shared generation may outlive the request that began it.
        if not context.limited_by and used >= context.reservation.cost and context in self._running:
            context.limited_by = await self._limiter.grow(context.reservation, context.growth)
        return context.limited_by is not None
