"""Accounts in the parent of several worker processes, which ask over a Unix socket.

Frames in both directions: four bytes of length, big endian, then msgpack. What a worker holds ends with its connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import msgspec

from tidewright_gateway.admission.limits.memory import MemoryStore
from tidewright_gateway.admission.limits.store import Settle, StoreLostError, Subject, Take, TakeResult

log = logging.getLogger(__name__)


class _Ping(msgspec.Struct, frozen=True, tag=True):
    """Is answered, no more."""


class _Question(msgspec.Struct, frozen=True, array_like=True):
    number: int
    body: Take | Settle | _Ping


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    number: int
    outcome: TakeResult | None = None


_encode = msgspec.msgpack.Encoder().encode
_question = msgspec.msgpack.Decoder(_Question).decode
_answer = msgspec.msgpack.Decoder(_Answer).decode


async def _read(reader: asyncio.StreamReader) -> bytes:
    """Raises asyncio.IncompleteReadError, or OSError, at the end."""
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


def _write(writer: asyncio.StreamWriter, frame: _Question | _Answer) -> None:
    body = _encode(frame)
    writer.write(len(body).to_bytes(4, "big") + body)


class LimitServer:
    """In the parent: `async with LimitServer(path): ...`, in any event loop."""

    def __init__(self, path: Path) -> None:
        """`path`: of the socket, in a folder that exists; what an earlier one left there is replaced."""
        self._path = path
        self._store = MemoryStore()
        self._held: dict[asyncio.StreamWriter, dict[str, tuple[Subject, ...]]] = {}

    async def __aenter__(self) -> LimitServer:
        umask = os.umask(0o177)  # whoever may write to the socket may give back what others hold
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path)
        finally:
            os.umask(umask)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._held:
            writer.close()
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held = self._held[writer] = {}
        try:
            while True:
                question = _question(await _read(reader))
                _write(writer, _Answer(question.number, await self._do(question.body, held)))
        except (asyncio.IncompleteReadError, OSError):
            pass  # the worker ended
        except msgspec.MsgspecError as error:
            log.error("invalid limits request, not from a worker of this gateway: %s", error)
        finally:
            del self._held[writer]
            writer.close()
            for id, subjects in held.items():
                await self._store.settle(Settle(id, subjects, 0))

    async def _do(self, body: Take | Settle | _Ping, held: dict[str, tuple[Subject, ...]]) -> TakeResult | None:
        if isinstance(body, Take):
            outcome = await self._store.take(body)
            if not outcome.refusal:
                held[body.id] = body.subjects
            return outcome
        if isinstance(body, Settle):
            held.pop(body.id, None)
            await self._store.settle(body)
        return None


class SocketLink:
    """In a worker."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[TakeResult | None]] = {}

    async def connect(self) -> None:
        # A connection that holds is kept even if the parent did not answer in time: with it would go all that is held.
        if self._writer is None:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._path)
            except OSError as error:
                raise StoreLostError(f"{self._path}: {error}") from None
            self._reading = asyncio.create_task(self._read_answers(reader, self._writer))
        await self.ping()

    async def ping(self) -> None:
        await self._ask(_Ping())

    async def take(self, take: Take) -> TakeResult:
        outcome = await self._ask(take)
        if outcome is None:
            raise StoreLostError("the parent process does not speak as this worker does")
        return outcome

    async def settle(self, settle: Settle) -> None:
        await self._ask(settle)

    async def renew(self, held: Sequence[tuple[str, tuple[Subject, ...]]]) -> None:
        pass  # the connection holds them

    async def close(self) -> None:
        if self._reading:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _ask(self, body: Take | Settle | _Ping) -> TakeResult | None:
        if self._writer is None:
            raise StoreLostError("the parent process ended")
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            _write(self._writer, _Question(number, body))
            return await answer
        finally:
            del self._waiting[number]

    async def _read_answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                answer = _answer(await _read(reader))
                waiting = self._waiting.get(answer.number)
                if waiting and not waiting.done():
                    waiting.set_result(answer.outcome)
        except (asyncio.IncompleteReadError, OSError):
            pass  # the parent ended
        finally:
            self._writer = None
            writer.close()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(StoreLostError("the parent process ended"))
