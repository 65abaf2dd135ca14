"""One connection: reads its messages, and sends what its generations have, one message after the other.

Only the writer sends. What generations have waits in their outboxes, and the reader waits when answers to it pile up:
a client that does not read makes nothing grow but its own generations, to their max_tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.websockets import WebSocket, WebSocketDisconnect

from tidewright_gateway.auth import credential_of
from tidewright_gateway.auth.callers import Caller
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http import access_log
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.openai.protocol import CompletionRequest
from tidewright_gateway.websocket import messages as m
from tidewright_gateway.websocket.backend import PATH, Backend, Kind
from tidewright_gateway.websocket.hub import Hub
from tidewright_gateway.websocket.resumable import ResumableStream
from tidewright_gateway.websocket.server import Transport

OPEN_TIMEOUT = 10.0  # seconds until a connection must be open
_MOST_SEEN = 32  # outputs, before the request has been looked at
_MAX_ANSWERS = 64  # that wait to be sent, before no further message is read

# Close codes: RFC 6455's, but for 4000 and above, which are this protocol's.
GOING_AWAY, IDLE, SLOW = 1012, 4000, 4001


class Session:
    def __init__(self, socket: WebSocket, hub: Hub, backend: Backend, settings: GatewaySettings) -> None:
        self._socket, self._hub, self._backend, self._settings = socket, hub, backend, settings
        self._transport = Transport.of(socket.scope)
        self._caller: Caller | None = None
        self._credential: str | None = None
        self.unsent_limit = settings.ws_unsent_bytes
        self._credits: int | None = None
        self._generations: dict[str, ResumableStream] = {}
        self._ready: dict[ResumableStream, None] = {}  # in the order of their turns
        self._answers: deque[m.FromServer] = deque()
        self._wake, self._has_room = asyncio.Event(), asyncio.Event()
        self._began_at = self._active_at = time.monotonic()
        self._sending_since: float | None = None
        self._close: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Until either side ends it."""
        loop = asyncio.get_running_loop()
        jobs = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        ends: list[asyncio.Future[Any]] = [*jobs, self._close]
        self._hub.connections.add(self)
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._hub.connections.discard(self)
            for generation in self._generations.values():
                self._hub.keep(generation)
            for job in jobs:
                job.cancel()
            results = await asyncio.gather(*jobs, return_exceptions=True)
            # Its transport would wait for ever for a client that does not read what was sent.
            loop.call_later(self._settings.ws_send_timeout, self._transport.abort)
        for result in results:
            if isinstance(result, Exception):
                raise result
        if self._close.done():
            code, reason = self._close.result()
            if code != SLOW:  # it would not read a farewell either
                await self._socket.close(code, reason)

    @property
    def unsent(self) -> int:
        return sum(generation.outbox.unsent for generation in self._generations.values())

    def check(self, now: float) -> None:
        """Ends it when its time is over. `now`: time.monotonic()."""
        settings, since = self._settings, self._sending_since
        if self._close.done():
            return
        silent = now - self._active_at
        if since is not None:
            if now - since > settings.ws_send_timeout:
                self._close.set_result((SLOW, ""))
        elif self._transport.is_going_away and not self._generations:
            self._close.set_result((GOING_AWAY, "the gateway is shutting down; reconnect"))
        elif self._caller is None and now - self._began_at > OPEN_TIMEOUT:  # pings are no reason to stay
            self._close.set_result((IDLE, f"no open within {OPEN_TIMEOUT:g} s"))
        elif silent > settings.ws_idle_timeout and not any(one.is_running for one in self._generations.values()):
            self._close.set_result((IDLE, f"idle for {settings.ws_idle_timeout:g} s; send a ping to stay"))

    def ready(self, generation: ResumableStream) -> None:
        self._ready[generation] = None
        self._wake.set()

    def give_up(self, generation: ResumableStream) -> None:
        self._remove(generation)
        error = ApiError(409, "another connection has resumed this generation", code="resumed_elsewhere")
        self._answer(m.Error.of(error, generation.id))

    def _remove(self, generation: ResumableStream) -> None:
        del self._generations[generation.id]
        self._ready.pop(generation, None)

    def _answer(self, message: m.FromServer) -> None:
        self._answers.append(message)
        self._wake.set()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while (message := self._next()) is not None:
                self._sending_since = time.monotonic()
                try:
                    await self._socket.send({"type": "websocket.send", "text": m.encode(message)})
                except WebSocketDisconnect:
                    return
                self._sending_since, self._active_at = None, time.monotonic()

    def _next(self) -> m.FromServer | None:
        if self._answers:
            message = self._answers.popleft()
            if len(self._answers) < _MAX_ANSWERS:
                self._has_room.set()
            return message
        while self._ready:
            generation = next(iter(self._ready))
            del self._ready[generation]
            if (own := generation.next_message()) is None:
                continue
            if isinstance(own, m.Done):
                self._remove(generation)
                if generation.is_dropped:
                    self._hub.forget(generation)
                else:
                    self._hub.keep(generation)  # that it was sent does not say that it arrived
            else:
                self._ready[generation] = None
            return own
        return None

    async def _read(self) -> None:
        while True:
            event = await self._socket.receive()
            if event["type"] == "websocket.disconnect":
                return
            self._active_at = time.monotonic()
            try:
                if (text := event.get("text")) is None:
                    raise m.BadMessageError(invalid("messages are text frames with JSON, not binary", code="binary"))
                await self._take(m.decode(text))
            except m.BadMessageError as error:
                access_log.write_refused(
                    access_log.client_address.get(),
                    access_log.WEBSOCKET,
                    PATH,
                    error.error,
                    key_id=self._caller.key_id if self._caller else None,
                )
                self._answer(m.Error.of(error.error, error.id))
            if len(self._answers) >= _MAX_ANSWERS:
                self._has_room.clear()
                await self._has_room.wait()

    async def _take(self, message: m.FromClient) -> None:
        id: str | None = getattr(message, "id", None)
        try:
            if isinstance(message, m.Ping):
                self._answer(m.Pong())
            elif isinstance(message, m.Open):
                await self._open(message)
            elif self._caller is None:
                raise invalid("the first message of a connection is open", "type", "not_open")
            elif isinstance(message, m.Generate):
                self._generate(message, self._caller)
            elif isinstance(message, m.Resume):
                # It may have been revoked, or have got other limits, since it was looked at.
                self._resume(message, await self._backend.authenticate(self._credential))
            elif isinstance(message, m.Credit):
                self._grant(message)
            else:
                self._running(message.id).cancel()
        except ApiError as error:
            raise m.BadMessageError(error, id) from None

    async def _open(self, message: m.Open) -> None:
        if self._caller is not None:
            raise invalid("the connection is open already", "type", "already_open")
        credential = f"Bearer {message.token}" if message.token else credential_of(dict(self._socket.headers.raw))
        self._caller = await self._backend.authenticate(credential)
        self._credential = credential
        self._transport.opened()
        if context := self._socket.scope.get("state", {}).get("context"):
            context.caller = self._caller  # for the access log
        if message.credits is not UNSET:
            self._credits = message.credits
        settings = self._settings
        self._answer(
            m.Opened(
                settings.model_name,
                settings.ws_max_generations,
                settings.max_body,
                settings.ws_idle_timeout,
                settings.ws_resume_grace,
            )
        )

    def _generate(self, message: m.Generate, caller: Caller) -> None:
        if self._transport.is_going_away:
            raise ApiError(503, "the gateway is shutting down; reconnect", code="going_away", retry_after=1)
        self._check_free(message.id)
        body = bytes(message.request)
        kind, num_choices = _look_at(body)
        credits = self._credits if message.credits is UNSET else message.credits
        generation = ResumableStream(caller, credits, num_choices)
        self._hub.add(generation)
        self._attach(generation, message.id)
        generation.start(self._backend, kind, body, self._credential)

    def _resume(self, message: m.Resume, caller: Caller) -> None:
        generation = self._hub.find(message.resume_token, caller)
        if generation.owner is not self or generation.id != message.id:
            self._check_free(message.id)
        credits = self._credits if message.credits is UNSET else message.credits
        generation.outbox.rewind(message.received, credits)
        if generation.owner is self:
            self._remove(generation)
        elif generation.owner:
            generation.owner.give_up(generation)
        self._hub.claim(generation)
        self._attach(generation, message.id)

    def _attach(self, generation: ResumableStream, id: str) -> None:
        generation.id, generation.owner = id, self
        self._generations[id] = generation
        self._answer(m.Started(id, generation.request_id, generation.resume_token))
        self.ready(generation)

    def _check_free(self, id: str) -> None:
        if id in self._generations:
            raise ApiError(409, f"generation {id!r} has not ended; choose another id", code="duplicate_id", param="id")
        if len(self._generations) >= (limit := self._settings.ws_max_generations):
            message = f"{limit} generations run over this connection (ws_max_generations); wait for one to end"
            raise ApiError(429, message, code="too_many_generations", limit="ws_max_generations")

    def _grant(self, message: m.Credit) -> None:
        generation = self._running(message.id)
        if generation.outbox.credits is None:
            raise invalid("this generation needs no credit; it began without credits", "tokens", "no_credits")
        generation.grant(message.tokens)

    def _running(self, id: str) -> ResumableStream:
        if (generation := self._generations.get(id)) is None:
            raise ApiError(404, f"no generation {id!r} runs over this connection", code="unknown_id", param="id")
        return generation


class _Fields(msgspec.Struct):
    messages: msgspec.Raw | UnsetType = UNSET
    prompt: msgspec.Raw | UnsetType = UNSET
    n: Any = 1


def _look_at(request: bytes) -> tuple[Kind, int]:
    """What it is a body of, and how many outputs it seems to ask for; all else is looked at when its caller is known.

    Raises:
        ApiError: it is no body of /v1/chat/completions or /v1/completions.
    """
    try:
        fields = msgspec.json.decode(request, type=_Fields)
    except RecursionError:
        raise invalid("request has too many objects or lists within each other", code="invalid_json") from None
    except msgspec.MsgspecError:
        raise invalid("request must be an object: a body of /v1/chat/completions or /v1/completions") from None
    if (fields.messages is UNSET) == (fields.prompt is UNSET):
        raise invalid("request needs either messages, for a chat, or prompt", "messages")
    n = fields.n if type(fields.n) is int and 0 < fields.n <= _MOST_SEEN else 1
    return CompletionRequest if fields.messages is UNSET else ChatRequest, n
