"""What a request gets that has joined the run of an equal one, also where the other request ends that run."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright_gateway.cache.responses import Replies
from tidewright_gateway.replicas.failover import Generation
from tidewright_gateway.replicas.triton import Reply


class JoinedRun(AsyncIterator[Reply]):
    """It does not end by the deadline, wait for a place or user's limits of the request that began the run.

    Where those end the run, `alone` continues after the tokens that came, as after a replica that failed. The reply
    that such a run ends with is dropped: it may have text that the model had held back.
    """

    def __init__(
        self, shared: Replies, generation: Generation, alone: Callable[[], AsyncGenerator[Reply, None]]
    ) -> None:
        """`generation` is this request's own."""
        self._replies, self._generation, self._alone = shared, generation, alone
        self._is_alone = False

    async def __anext__(self) -> Reply:
        if not self._is_alone:
            try:
                reply = await anext(aiter(self._replies))
                if not self._is_cut(reply):
                    self._generation.delivered += reply.token_ids
                    return reply
            except ModelError as error:
                if not (error.outcome is Outcome.REQUEST_TIMEOUT or error.limit == "queue_timeout") or self._is_late:
                    raise
            await self._replies.aclose()
            self._replies, self._is_alone = self._alone(), True
        return await anext(aiter(self._replies))

    async def aclose(self) -> None:
        await self._replies.aclose()

    def _is_cut(self, reply: Reply) -> bool:
        return reply.is_limited or (reply.finish_reason == "timeout" and not self._is_late)

    @property
    def _is_late(self) -> bool:
        return self._generation.deadline.expired(time.monotonic())
