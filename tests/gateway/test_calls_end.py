"""The gateway does not cancel a call to Triton that is about to end: Triton leaks memory for each of those."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from benchmarks.echo_replica import Echo, start
from tidewright.bench.machine import free_ports
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright_gateway.replicas import triton
from tidewright_gateway.replicas.triton import CallRequest, TritonClient

PATIENCE = 30.0  # seconds


class SlowToEnd(Echo):
    """Ends a call only when it is told to, some time after its last response."""

    def __init__(self) -> None:
        super().__init__(per_response=8, pause=0.0)
        self.may_end, self.changed = asyncio.Event(), asyncio.Condition()
        self.ended = self.cancelled = 0

    async def stream(self, request: object, context: object) -> None:
        try:
            await super().stream(request, context)  # type: ignore[arg-type]
            await self.may_end.wait()
            self.ended += 1
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            async with self.changed:
                self.changed.notify_all()

    async def wait(self, what: Callable[[], bool]) -> None:
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(what), PATIENCE)


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[TritonClient, SlowToEnd]]:
    (port,) = free_ports(1)
    echo = SlowToEnd()
    server = await start(port, echo)
    client = TritonClient(f"127.0.0.1:{port}", 1)
    try:
        yield client, echo
    finally:
        echo.may_end.set()
        await client.close()
        await server.stop(0)


async def ask(client: TritonClient) -> None:
    await client.control("status", PATIENCE)


async def generate(client: TritonClient) -> None:
    order = CallRequest("one", [1], b'{"max_tokens":20}')
    call = client.generate("decoder", order)
    while not (await call.read()).finish_reason:
        pass
    call.close()


@pytest.mark.parametrize("call", [ask, generate])
def test_a_call_with_its_last_response_is_not_cancelled(call: Callable[[TritonClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with pair() as (client, echo):
            # A cancel of the first would arrive before the second does: both go over one connection.
            await call(client)
            await call(client)
            echo.may_end.set()
            await echo.wait(lambda: echo.ended + echo.cancelled == 2)
            assert (echo.ended, echo.cancelled) == (2, 0)

    asyncio.run(run())


@pytest.mark.parametrize("call", [ask, generate])
def test_a_call_that_does_not_end_is_cancelled_at_last(
    call: Callable[[TritonClient], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "END_TIMEOUT", 0.05)

    async def run() -> None:
        async with pair() as (client, echo):
            await call(client)
            await echo.wait(lambda: echo.cancelled == 1)
            assert echo.ended == 0

    asyncio.run(run())


def test_a_generation_left_before_its_end_is_cancelled_at_once() -> None:
    async def run() -> None:
        async with pair() as (client, echo):
            call = client.generate("decoder", CallRequest("one", [1], b'{"max_tokens":20}'))
            assert not (await call.read()).finish_reason
            call.close()
            await echo.wait(lambda: echo.cancelled == 1)

    asyncio.run(run())


class OtherAnswers(Echo):
    """A server that has a model of this name, too, or one of another version."""

    async def stream(self, request: object, context: Any) -> None:
        await context.write(b"")  # a response without outputs


def test_an_answer_of_another_kind_is_an_error_of_the_model() -> None:
    async def scenario() -> None:
        (port,) = free_ports(1)
        server = await start(port, OtherAnswers(per_response=1, pause=0.0))
        client = TritonClient(f"127.0.0.1:{port}", 1)
        try:
            with pytest.raises(ModelError) as told:
                await client.control("status", PATIENCE)
            assert told.value.outcome is Outcome.UNAVAILABLE
            call = client.generate("decoder", CallRequest("1", [1], b"{}"))
            with pytest.raises(ModelError) as told:
                await call.read()
            assert told.value.outcome is Outcome.ENGINE_FAILED
            call.close()
        finally:
            await client.close()
            await server.stop(0)

    asyncio.run(scenario())
