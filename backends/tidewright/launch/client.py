"""A running server, Triton or a gateway, for the commands: streams the answer to a chat or a text. No terminal.

A gateway is called by Tidewright's own client (clients/python); Triton's HTTP port here.
"""

from __future__ import annotations

import json
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tidewright.launch.control import WHICH_PORT, Answer, explained, triton_error
from tidewright.launch.errors import LaunchError
from tidewright.launch.gateway_control import base_url, error_of, is_strange, meaning, refusal, strange
from tidewright_client import Client as GatewayClient
from tidewright_client import Finish, Stream, Text, TidewrightError

_JSON = {"Content-Type": "application/json"}

# Nothing may come for a while before the first token (a long queue, a long prompt).
_SILENCE = 300.0  # seconds
_TIMEOUT = httpx.Timeout(10, read=_SILENCE)

Messages = list[dict[str, str]]
"""A chat so far, as OpenAI's API has it."""
Sampling = dict[str, Any]
"""Sampling parameters by name."""


class RequestFailedError(LaunchError):
    """The server can't be reached, or refused the request; the message is for the user."""


@dataclass(frozen=True)
class Delta:
    """Further text of an answer."""

    text: str
    finish_reason: str | None
    """Set in the last one."""


Deltas = Generator[Delta, None, None]
"""An answer as it comes. Closing it cancels the request. Raises RequestFailedError."""


class Client:
    """One server, by its address. The first request detects whether it is a gateway."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`key`: of a gateway."""
        self._connection, self._key = _Connection(base_url(url)), key
        self._server: _Server | None = None

    def close(self) -> None:
        self._connection.close()
        if self._server:
            self._server.close()

    def chat(self, messages: Messages, sampling: Sampling) -> Deltas:
        """The next answer of a chat. Raises RequestFailedError."""
        return self._found().chat(messages, sampling)

    def complete(self, prompt: str, sampling: Sampling) -> Deltas:
        """The continuation of a text. Raises RequestFailedError."""
        return self._found().complete(prompt, sampling)

    def _found(self) -> _Server:
        if self._server is None:
            self._server = _find(self._connection, self._key)
        return self._server


def _find(connection: _Connection, key: str | None) -> _Server:
    """A gateway lists its models, which a request needs to name; Triton has no such path."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer = connection.ask("GET", "/v1/models", headers=headers)
    try:
        model = json.loads(answer.content)["data"][0]["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        if error_of(answer):
            raise RequestFailedError(refusal(connection.url, answer, key)) from None
        if is_strange(answer):
            raise RequestFailedError(strange(connection.url)) from None
        return _Triton(connection)
    return _Gateway(connection.url, key, str(model))


class _Connection:
    """HTTP to one server; its errors are RequestFailedError."""

    def __init__(self, url: str) -> None:
        self.url = url
        # The machine's certificates, as for the commands that do not use httpx.
        verify: ssl.SSLContext | bool = ssl.create_default_context() if url.startswith("https:") else True
        self._http = httpx.Client(timeout=_TIMEOUT, verify=verify)

    def close(self) -> None:
        self._http.close()

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """The whole answer, whatever its status."""
        with self._open(method, path, body, headers) as response:
            return _whole(response)

    def events(self, path: str, body: Any, refused: Callable[[Answer], str]) -> Iterator[dict[str, Any]]:
        """Server-sent events. `refused`: the message of an answer that is an error."""
        with self._open("POST", path, body) as response:
            if not response.is_success:
                raise RequestFailedError(refused(_whole(response)))
            yield from _events(response.iter_bytes())

    @contextmanager
    def _open(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        content = None if body is None else _to_json(body)
        try:
            with self._http.stream(
                method, self.url + path, content=content, headers={**_JSON, **(headers or {})}
            ) as response:
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> RequestFailedError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol | httpx.InvalidURL):
            why = _certificate_error(error)
            if why:
                return RequestFailedError(f"can't reach {self.url}: {explained(why, self.url)}")
            return RequestFailedError(
                f"no server at {self.url} ({error}); start one with: tidewright serve, or give its address with --url"
            )
        if isinstance(error, httpx.ReadTimeout):
            return RequestFailedError(f"{self.url} sent nothing for {_TIMEOUT.read:g} s; see the server's log")
        hint = "see the server's log"
        if isinstance(error, httpx.RemoteProtocolError) and self.url.startswith("http:"):
            if "illegal" in str(error):  # h11's, of a first line that is none of HTTP/1.1
                return RequestFailedError(
                    f"{self.url} does not speak HTTP/1.1: if it is Triton's gRPC port, {WHICH_PORT}; if it speaks TLS, "
                    "write https:// before its address"
                )
            hint += ", or write https:// before its address if it speaks TLS"
        return RequestFailedError(f"the connection to {self.url} broke: {error}; {hint}")


class _Server(ABC):
    @abstractmethod
    def chat(self, messages: Messages, sampling: Sampling) -> Deltas: ...

    @abstractmethod
    def complete(self, prompt: str, sampling: Sampling) -> Deltas: ...

    def close(self) -> None:  # noqa: B027 - only some have something to close
        """Of what is its own."""


class _Triton(_Server):
    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def chat(self, messages: Messages, sampling: Sampling) -> Deltas:
        yield from self._generate({"input_ids": self._tokenize(messages)}, sampling)

    def complete(self, prompt: str, sampling: Sampling) -> Deltas:
        yield from self._generate({"text_input": prompt}, sampling)

    def _tokenize(self, messages: Messages) -> list[int]:
        """Token ids of the messages in the model's chat template."""
        data = json.dumps(messages, ensure_ascii=False)
        inputs = [{"name": "messages", "shape": [1, 1], "datatype": "BYTES", "data": [data]}]
        answer = self._connection.ask("POST", "/v2/models/tokenizer/infer", {"inputs": inputs})
        if answer.status != 200:
            raise RequestFailedError(self._refused(answer))
        try:
            token_ids: list[int] = json.loads(answer.content)["outputs"][0]["data"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise RequestFailedError(
                f"{self._connection.url} is no Tidewright server: its tokenizer returned no ids"
            ) from None
        return token_ids

    def _generate(self, prompt: dict[str, Any], sampling: Sampling) -> Deltas:
        """It calls the decoder itself: through Triton's ensembles a cancellation gets lost."""
        body = {
            **prompt,
            "stream": True,
            "return_finish_reason": True,
            "sampling_parameters": json.dumps(sampling),
        }
        for event in self._connection.events("/v2/models/decoder/generate_stream", body, self._refused):
            if "error" in event:  # status 200 was sent before it went wrong
                raise RequestFailedError(str(event["error"]))
            reason = event.get("finish_reason")
            # On the wire a string, as in Triton's vLLM backend.
            yield Delta(event.get("text_output") or "", None if reason == "None" else reason)

    def _refused(self, answer: Answer) -> str:
        return _generates(self._connection.url, _triton_error(answer))


class _Gateway(_Server):
    def __init__(self, url: str, key: str | None, model: str) -> None:
        self._url, self._key = url, key
        # No end: somebody watches the answer.
        self._client = GatewayClient(url, key=key or "", model=model, timeout=None, idle_timeout=_SILENCE)

    def chat(self, messages: Messages, sampling: Sampling) -> Deltas:
        messages, sampling = _as_sent(messages), _as_sent(sampling)
        return self._deltas(lambda: self._client.stream_chat(messages, extra=sampling))

    def complete(self, prompt: str, sampling: Sampling) -> Deltas:
        prompt, sampling = _as_sent(prompt), _as_sent(sampling)
        return self._deltas(lambda: self._client.stream_complete(prompt, extra=sampling))

    def close(self) -> None:
        self._client.close()

    def _deltas(self, begin: Callable[[], Stream]) -> Deltas:
        try:
            with begin() as stream:
                for event in stream:
                    if isinstance(event, Text):
                        yield Delta(event.text, None)
                    elif isinstance(event, Finish):
                        limit = event.limited_by
                        yield Delta("", f"the limit {limit} of the API key is used up" if limit else event.reason)
        except TidewrightError as error:
            raise RequestFailedError(_generates(self._url, self._meaning(error))) from None

    def _meaning(self, error: TidewrightError) -> str:
        if error.said is None:
            return error.message
        after = "" if error.retry_after is None else f"{error.retry_after:g}"
        return meaning(self._url, error.status, error.code, error.said, after, self._key)


def _generates(url: str, message: str) -> str:
    """The message of a refusal, unless the server has another task."""
    if "--task embed" not in message:
        return message
    return f"{url} runs with --task embed and generates no text; ask its gateway's /v1/embeddings, or another server"


def _triton_error(answer: Answer) -> str:
    # An endpoint that streams sends its refusal as an event, too.
    error = triton_error(answer.content.removeprefix(b"data:"))
    return error or f"the server answered with status {answer.status}; is it a Tidewright server?"


def _whole(response: httpx.Response) -> Answer:
    return Answer(response.status_code, response.read(), response.headers.get("Retry-After"))


def _certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error


def _to_json(value: Any) -> bytes:
    """UTF-8, in which a byte of the command line that was none becomes a question mark."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace")


def _as_sent(value: Any) -> Any:
    """For the gateway's client, which refuses what is no text."""
    return json.loads(_to_json(value))


def _events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Server-sent events. Lines end with a newline only: httpx's own `iter_lines` also cuts at U+2028 in a text."""
    pending = b""
    for chunk in chunks:
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if data == line.strip() or data == b"[DONE]":  # a comment, or the end of a gateway's stream
                continue
            try:
                yield json.loads(data)
            except ValueError:
                raise RequestFailedError("the server sent an event that is not JSON") from None
