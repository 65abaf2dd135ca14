"""A request that joined an equal one's run gets its whole answer, whatever ends the other's."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace

import pytest

from helpers.scripted_replicas import samples
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.degradation import Route
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import SamplingParams
from tidewright_gateway.admission.limits import Reservation
from tidewright_gateway.admission.limits.store import LimitName
from tidewright_gateway.admission.queue import Queue
from tidewright_gateway.cache.responses import CacheState, ResponseCache
from tidewright_gateway.context import RequestContext
from tidewright_gateway.execution import Execution
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.replicas.failover import Generation
from tidewright_gateway.replicas.triton import Reply
from tidewright_gateway.tracing.context import Tracer

TOKENS = 8
WHOLE = [f"{number} " for number in range(TOKENS)]
HELD_BACK = "held back"


class ScriptedModel:
    """In the place of a failover. Of the request `first` it ends the answer so, after some tokens."""

    def __init__(self, first: Generation, end: Reply | ModelError | None, after: int) -> None:
        self._first, self._end, self._after = first, end, after
        self.asked: list[tuple[str, int]] = []
        """Request, and tokens that it had before."""

    async def generate(self, generation: Generation, route: Route) -> AsyncGenerator[Reply, None]:
        self.asked.append((generation.request_id, len(generation.delivered)))
        for number in range(len(generation.delivered), TOKENS):
            await asyncio.sleep(0)
            if generation is self._first and self._end and number == self._after:
                if isinstance(self._end, ModelError):
                    raise self._end
                yield self._end
                return
            yield Reply(WHOLE[number], [number], "length" if number == TOKENS - 1 else None, None)


class World:
    """Two equal requests, of which the second comes while the first runs."""

    def __init__(self, end: Reply | ModelError | None = None, after: int = 3, deadline: float = math.inf) -> None:
        self.first, self.second = (self._request(name, at) for name, at in (("first", 0.0), ("second", deadline)))
        self.model = ScriptedModel(self.first.generations[0], end, after)
        self.places = 1
        self.queue = Queue(lambda: self.places, 10)
        limiter, self.metrics = SimpleNamespace(grow=self._grow), Metrics()
        running = {self.first: None, self.second: None}
        self.execution = Execution(60.0, limiter, ResponseCache(2**20, 60), self.metrics, running)  # type: ignore[arg-type]
        for context in (self.first, self.second):
            context.served = SimpleNamespace(name="m", queue=self.queue, failover=self.model)  # type: ignore[assignment]

    def _request(self, name: str, deadline: float) -> RequestContext:
        context = RequestContext(name, Tracer(0).begin(()))
        context.is_repeatable = True
        sampling = SamplingParams(temperature=0, max_tokens=TOKENS)
        context.generations = [Generation(name, [1], sampling, Deadline(deadline or math.inf))]
        return context

    async def _grow(self, reservation: Reservation, cost: int) -> LimitName:
        return "tokens_per_minute"

    async def read(self, context: RequestContext) -> list[Reply]:
        return [reply async for _, reply in self.execution.replies(context)]

    async def run(self) -> list[Reply]:
        """What the second gets."""
        first, second = (asyncio.ensure_future(self.read(context)) for context in (self.first, self.second))
        await asyncio.wait((first, second), timeout=30)
        assert self.second.cache_states == [CacheState.SHARED]
        if first.exception() is None:
            assert self.queue.num_running == 0
        return second.result()


def text(replies: list[Reply]) -> str:
    return "".join(reply.text for reply in replies)


@pytest.mark.parametrize("after", [0, 3, TOKENS - 1])
@pytest.mark.parametrize(
    "end",
    [
        Reply(HELD_BACK, [99], "timeout", None),
        Reply(HELD_BACK, [], "length", None, is_limited=True),
        ModelError("request timed out", Outcome.REQUEST_TIMEOUT),
        ModelError("no place became free", Outcome.OVERLOADED, "queue_timeout"),
    ],
)
def test_it_goes_on_by_itself_after_the_tokens_that_came(end: Reply | ModelError, after: int) -> None:
    world = World(end, after)
    got = asyncio.run(world.run())
    assert text(got) == "".join(WHOLE)
    assert [reply.finish_reason for reply in got] == [None] * (TOKENS - 1) + ["length"]
    assert world.model.asked == [("first", 0), ("second", after)]
    assert world.queue.num_running == 0
    assert samples(world.metrics)["overhead_seconds_count",] == 1  # what it shared is no time of the gateway's own


def test_it_goes_on_where_the_first_one_s_user_has_no_tokens_left() -> None:
    world = World()
    world.first.growth = 1
    assert text(asyncio.run(world.run())) == "".join(WHOLE)
    assert (world.first.limited_by, world.second.limited_by) == ("tokens_per_minute", None)
    assert world.model.asked == [("first", 0), ("second", 0)]


@pytest.mark.parametrize("end", [None, Reply("the end", [3], "length", None), Reply("the end", [], "stop", None)])
def test_a_run_that_ends_whole_is_all_it_needs(end: Reply | None) -> None:
    """Also by the model's context, before max_tokens."""
    world = World(end)
    got = asyncio.run(world.run())
    assert text(got) == "".join([*WHOLE[:3], "the end"] if end else WHOLE)
    assert world.model.asked == [("first", 0)]


@pytest.mark.parametrize("outcome", [Outcome.INVALID, Outcome.OVERLOADED, Outcome.ENGINE_FAILED])
def test_what_would_be_its_own_end_too_is_its_end(outcome: Outcome) -> None:
    world = World(ModelError("no", outcome))
    with pytest.raises(ModelError, match="no"):
        asyncio.run(world.run())
    assert world.model.asked == [("first", 0)]


@pytest.mark.parametrize(
    "end", [Reply("", [], "timeout", None), ModelError("request timed out", Outcome.REQUEST_TIMEOUT)]
)
def test_nor_does_it_go_on_once_its_own_time_is_over(end: Reply | ModelError) -> None:
    world = World(end, deadline=time.monotonic())
    if isinstance(end, ModelError):
        with pytest.raises(ModelError, match="timed out"):
            asyncio.run(world.run())
    else:
        assert asyncio.run(world.run())[-1].finish_reason == "timeout"
    assert world.model.asked == [("first", 0)]


def test_one_that_leaves_while_it_goes_on_leaves_its_place_too() -> None:
    world = World(Reply("", [], "timeout", None))

    async def main() -> None:
        reading = asyncio.ensure_future(world.read(world.first))
        await asyncio.sleep(0)
        replies = world.execution.replies(world.second)
        for _ in range(5):
            await anext(replies)
        await reading
        assert world.queue.num_running == 1
        await replies.aclose()
        assert world.queue.num_running == 0

    asyncio.run(main())
