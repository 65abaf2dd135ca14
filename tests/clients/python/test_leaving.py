"""A stream that is left in any way ends in the server; a client is shared by threads and tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.conformance import ScriptedVectors
from tidewright_client import AsyncClient, Client, InvalidRequest

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedVectors]:
    with ScriptedVectors() as running:
        yield running


def test_breaking_out_of_a_loop(scripted: ScriptedVectors) -> None:
    base_url = scripted.begin("cancel")
    with Client(base_url, model="m") as client:
        for _ in client.stream_chat(CHAT):
            break
        assert scripted.faults(base_url) == []  # while the client goes on


@pytest.mark.parametrize("leave", ["break", "close", "cancel the task"])
def test_leaving_in_a_loop_of_events(scripted: ScriptedVectors, leave: str) -> None:
    base_url = scripted.begin("cancel")

    async def read(client: AsyncClient, began: asyncio.Event) -> None:
        stream = client.stream_chat(CHAT)
        async for _ in stream:
            began.set()
            if leave == "break":
                break
            if leave == "close":
                await stream.aclose()

    async def run() -> list[str]:
        began = asyncio.Event()
        async with AsyncClient(base_url, model="m") as client:
            task = asyncio.create_task(read(client, began))
            await began.wait()
            if leave == "cancel the task":
                task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() == (leave == "cancel the task")
            return await asyncio.to_thread(scripted.faults, base_url)

    assert asyncio.run(run()) == []


def test_threads_and_tasks_share_a_client(scripted: ScriptedVectors) -> None:
    with Client(scripted.begin("whole_answer"), model="m") as client, ThreadPoolExecutor(8) as threads:
        assert {answer.text for answer in threads.map(lambda _: client.chat(CHAT), range(64))} == {"Hello"}

    async def run() -> set[str]:
        async with AsyncClient(scripted.begin("whole_answer"), model="m") as client:
            return {answer.text for answer in await asyncio.gather(*[client.chat(CHAT) for _ in range(64)])}

    assert asyncio.run(run()) == {"Hello"}


def test_a_stream_is_read_once(scripted: ScriptedVectors) -> None:
    with Client(scripted.begin("stream_of_texts"), model="m") as client:
        stream = client.stream_chat(CHAT)
        assert next(stream)
        assert list(stream)  # the rest
        assert next(stream, None) is None
        with pytest.raises(InvalidRequest, match="read once"):
            list(stream)


def test_a_stream_is_read_once_in_a_loop_of_events(scripted: ScriptedVectors) -> None:
    async def run() -> None:
        async with AsyncClient(scripted.begin("stream_of_texts"), model="m") as client:
            stream = client.stream_chat(CHAT)
            assert [event async for event in stream]
            with pytest.raises(InvalidRequest, match="read once"):
                [event async for event in stream]

    asyncio.run(run())
