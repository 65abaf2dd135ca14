"""Generations over /v1/stream, one at a time on the connection that each user keeps."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import websocket

from loadtests.options import Options
from loadtests.samples import NO_CONNECTION, SILENT
from loadtests.users.base import GenerationUser, RequestError, Tokens, Wanted
from loadtests.users.http import body

PATH = "/v1/stream"


class WebSocketCaller:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._url = "ws" + options.url.removeprefix("http").rstrip("/") + PATH
        self._socket: websocket.WebSocket | None = None
        self._key = ""
        self._numbers = itertools.count(1)

    def call(self, wanted: Wanted, tokens: Tokens) -> bool:
        try:
            return self._generate(wanted, tokens)
        except websocket.WebSocketTimeoutException:
            self.close()
            raise RequestError(f"{SILENT}{self._options.silence:g} s") from None
        except (websocket.WebSocketException, OSError) as error:
            self.close()
            raise RequestError(f"connection: {getattr(error, 'strerror', None) or type(error).__name__}") from None
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            self.close()
            raise RequestError(f"not an answer of the API: {type(error).__name__}") from None

    def _generate(self, wanted: Wanted, tokens: Tokens) -> bool:
        if self._socket is None or self._key != wanted.key:
            self.close()
            self._open(wanted.key)
        name, arrivals, left = str(next(self._numbers)), 0, False
        self._send(type="generate", id=name, request=body(wanted, self._options.model))
        while True:
            message = self._receive()
            if message.get("id") != name:
                continue
            if message["type"] == "token":
                tokens.arrived()
                arrivals += 1
                if arrivals == wanted.leaves_after:
                    left = True
                    self._send(type="cancel", id=name)
            elif message["type"] in ("done", "error"):
                problem = message if message["type"] == "error" else message.get("error")
                if problem:
                    raise RequestError(f"status {problem.get('status')}: {problem.get('message')}")
                tokens.prompt, tokens.output = (message["usage"][f"{it}_tokens"] for it in ("prompt", "completion"))
                return not (left and message["choices"][0]["finish_reason"] == "cancelled")

    def _open(self, key: str) -> None:
        try:
            self._socket = websocket.create_connection(self._url, timeout=self._options.silence)
            self._key = key
            self._send(type="open", **({"token": key} if key else {}))
            message = self._receive()
        except (websocket.WebSocketTimeoutException, TimeoutError):  # no generation has begun
            self.close()
            raise RequestError(NO_CONNECTION) from None
        if message["type"] != "opened":
            self.close()
            raise RequestError(f"status {message.get('status')}: {message.get('message')}")

    def _send(self, **message: Any) -> None:
        assert self._socket
        self._socket.send(msgspec.json.encode(message).decode())

    def _receive(self) -> dict[str, Any]:
        assert self._socket
        message: dict[str, Any] = msgspec.json.decode(self._socket.recv())
        return message

    def close(self) -> None:
        if self._socket:
            self._socket.close(timeout=1)
            self._socket = None


class WebSocketUser(GenerationUser):
    protocol = "websocket"
    make = WebSocketCaller
