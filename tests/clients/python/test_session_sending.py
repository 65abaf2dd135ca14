"""What a session sends, over a connection that takes its time: in order, and nothing is lost if its caller goes."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import websockets.sync.client

from tidewright_client import Text, settings
from tidewright_client.sessions.async_session import AsyncSession
from tidewright_client.sessions.core import SessionCore
from tidewright_client.sessions.session import Session

SETTINGS = settings.make("http://h", None, 0, None, 1, 10**6, None)
PATIENCE = 30.0  # seconds


def said(type: str, **fields: Any) -> str:
    return json.dumps({"type": type, **fields})


def begin(core: SessionCore, id: str) -> None:
    core.receive(said("started", id=id, request_id="r", resume_token="t"))
    core.receive(said("token", id=id, index=0, seq=1, text="a", token_ids=[7]))


class SlowConnection:
    """Of asyncio: it takes what is sent once it may."""

    def __init__(self) -> None:
        self.may_send, self.sent = asyncio.Event(), list[str]()

    async def send(self, message: str) -> None:
        await self.may_send.wait()
        self.sent.append(json.loads(message)["type"])


@pytest.fixture
def open_session(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[AsyncSession, SlowConnection]]:
    """Makes one, for a loop that runs."""

    async def idle(_: AsyncSession) -> None:
        return

    def make() -> tuple[AsyncSession, SlowConnection]:
        session, connection = AsyncSession(SETTINGS, "m", None), SlowConnection()
        session._core.receive(said("opened", resume_grace=1))
        session._connection = connection  # type: ignore[assignment]
        return session, connection

    monkeypatch.setattr(AsyncSession, "_run", idle)
    return make


def test_an_event_does_not_wait_for_what_is_sent(open_session: Callable[[], tuple[AsyncSession, Any]]) -> None:
    """A caller that gives up waiting for a grant's way would lose the event that it was to get."""

    async def run() -> None:
        session, connection = open_session()
        generation = session.stream_complete("x", credits=1)  # each token is granted at once
        begin(session._core, "1")
        assert await asyncio.wait_for(anext(generation), PATIENCE) == Text("a")
        assert connection.sent == []
        connection.may_send.set()
        await asyncio.gather(*session._tasks)
        assert connection.sent == ["generate", "credit"]

    asyncio.run(run())


def test_a_caller_that_is_cancelled_takes_no_message_with_it(
    open_session: Callable[[], tuple[AsyncSession, Any]],
) -> None:
    async def run() -> None:
        session, connection = open_session()
        generation = session.stream_complete("x")
        connection.may_send.set()
        await asyncio.gather(*session._tasks)
        begin(session._core, "1")
        connection.may_send.clear()
        cancelling = asyncio.create_task(generation.cancel())
        while session._outbox or not generation._state.is_cancelled:
            await asyncio.sleep(0)  # until it is taken to be sent
        cancelling.cancel()
        await asyncio.wait([cancelling])
        connection.may_send.set()
        await asyncio.gather(*session._tasks)
        assert connection.sent == ["generate", "cancel"]

    asyncio.run(run())


class SlowSyncConnection:
    """Says that it is open, and takes its time with what is sent first: another thread sends meanwhile."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.sent, self.is_over = list[str](), threading.Event()
        self._meanwhile = threading.Thread(target=meanwhile, daemon=True)

    def __enter__(self) -> SlowSyncConnection:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __iter__(self) -> Iterator[str]:
        yield said("opened", resume_grace=1)
        self.is_over.wait(PATIENCE)

    def send(self, message: str) -> None:
        if "generate" in message:
            self._meanwhile.start()
            self._meanwhile.join(0.2)  # it waits for us, or it comes before us
        self.sent.append(json.loads(message)["type"])

    def wait(self) -> None:
        self._meanwhile.join(PATIENCE)
        assert not self._meanwhile.is_alive()

    def close(self) -> None:
        self.is_over.set()


def test_a_cancel_does_not_come_before_what_it_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway would not know what to cancel, and generate for nobody."""
    began = threading.Event()

    def cancel() -> None:
        assert began.wait(PATIENCE)
        generation.cancel()

    connection = SlowSyncConnection(cancel)
    monkeypatch.setattr(websockets.sync.client, "connect", lambda *_, **__: connection)
    monkeypatch.delattr(websockets.sync.client, "reconnect", raising=False)
    session = Session(SETTINGS, "m", None)
    generation = session.stream_complete("x")
    began.set()
    while not connection.sent[2:]:
        assert session._thread.is_alive()
        time.sleep(0.01)
    connection.wait()
    assert connection.sent == ["open", "generate", "cancel"]
    session.close()
