"""Chat completions as server-sent events, over one kept connection a user."""

from __future__ import annotations

import time
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import gevent.socket
import msgspec
from geventhttpclient import HTTPClient

from loadtests import prompts
from loadtests.options import Options
from loadtests.samples import NO_CONNECTION, SILENT
from loadtests.users.base import GenerationUser, RequestError, Tokens, Wanted

CONNECT = 10.0  # seconds
MAX_BODY = 65536  # bytes that are read of an error
PATH = "/v1/chat/completions"


def body(wanted: Wanted, model: str) -> dict[str, Any]:
    """Of a chat completion: all its tokens come, whatever the model says."""
    text = prompts.text(wanted.rng, wanted.lengths.prompt)
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": wanted.lengths.answer,
        "ignore_eos": True,
        "temperature": 0.7,
    }


class HttpCaller:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._prefix = urlsplit(options.url).path.rstrip("/")
        self._client = self._connected()

    def _connected(self) -> HTTPClient:
        parts = urlsplit(self._options.url)
        is_tls = parts.scheme == "https"
        return HTTPClient(
            parts.hostname or "",
            parts.port or (443 if is_tls else 80),
            ssl=is_tls,
            concurrency=1,
            connection_timeout=min(CONNECT, self._options.silence / 4),  # of each address of the host
            network_timeout=self._options.silence,
        )

    def _reconnect(self) -> None:
        """After a stream that was not read to its end: a client that was closed can't be used again."""
        self._client.close()
        self._client = self._connected()

    def call(self, wanted: Wanted, tokens: Tokens) -> bool:
        content = {**body(wanted, self._options.model), "stream": True, "stream_options": {"include_usage": True}}
        headers = {"Content-Type": "application/json"}
        if wanted.key:
            headers["Authorization"] = f"Bearer {wanted.key}"
        whole, began = False, time.monotonic()
        try:
            answer = self._client.request("POST", self._prefix + PATH, msgspec.json.encode(content), headers)
            if answer.status_code != 200:
                raise RequestError(f"status {answer.status_code}: {_message(answer.read(MAX_BODY))}")
            whole = self._read(answer, wanted, tokens)
            return whole
        except gevent.socket.timeout:
            if time.monotonic() - began < 0.9 * self._options.silence:  # gevent's timers may be some ms early
                raise RequestError(NO_CONNECTION) from None
            raise RequestError(f"{SILENT}{self._options.silence:g} s") from None
        except OSError as error:
            raise RequestError(f"connection: {error.strerror or type(error).__name__}") from None
        except HTTPException as error:  # of a server that went away, most of all
            raise RequestError(f"connection: {error}") from None
        except (ValueError, msgspec.DecodeError) as error:
            raise RequestError(f"not an answer of the API: {type(error).__name__}") from None
        finally:
            if not whole:
                self._reconnect()

    def _read(self, answer: Any, wanted: Wanted, tokens: Tokens) -> bool:
        arrivals, finished = 0, False
        while line := answer.readline(b"\n"):
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                answer.read()  # the end of the body, so that the connection can be kept
                if not finished:
                    raise RequestError("the stream ended without a finish_reason")
                return True
            event = msgspec.json.decode(line[6:])
            if problem := event.get("error"):
                raise RequestError(f"in the stream: {problem.get('message', problem)}")
            if usage := event.get("usage"):
                tokens.prompt, tokens.output = usage["prompt_tokens"], usage["completion_tokens"]
            for choice in event.get("choices", ()):
                finished = finished or bool(choice.get("finish_reason"))
                if choice["delta"].get("content"):
                    tokens.arrived()
                    arrivals += 1
            if arrivals == wanted.leaves_after > 0 and not finished:
                answer.release()
                return False
        raise RequestError("the stream ended without [DONE]")

    def close(self) -> None:
        self._client.close()


def _message(raw: bytes) -> str:
    try:
        return str(msgspec.json.decode(raw)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return raw[:80].decode(errors="replace")


class HttpUser(GenerationUser):
    protocol = "http"
    make = HttpCaller
