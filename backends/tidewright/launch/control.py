"""Asks a running server about itself: the decoders' `control` input, and whether its stubs live. HTTP only.

Imports little: `tidewright health` is run as a probe, every few seconds.
"""

from __future__ import annotations

import http.client
import json
import select
import ssl
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from tidewright.launch.errors import LaunchError

if TYPE_CHECKING:
    from tidewright.schema import ControlWord

CONNECT_TIMEOUT = 5.0  # seconds
MAX_ANSWER = 16 * 2**20  # bytes; the metrics and adapters of a large server take a few MiB at most
STUCK = "stuck: "  # as schema.STUCK, which costs an import of msgspec
NOT_ALLOWED = 405
WHICH_PORT = "give Triton's HTTP port (8000 by default), or the gateway's (8080)"

T = TypeVar("T")
Waiting = Generator[None, None, T]
"""A wait that blocks nobody: yields as long as there is nothing to do, and returns what it waited for."""


class UnreachableError(LaunchError):
    """Nobody listens there, or the connection broke."""


class NoAnswerError(LaunchError):
    """Somebody listens there, but nothing came in time."""


class DeadStubError(LaunchError):
    """The Python process of a model is gone. Triton does not start another."""


class TroubleError(LaunchError):
    """The server answered, and the answer is no."""


class Answer(NamedTuple):
    """A response, whatever its status."""

    status: int
    content: bytes
    retry_after: str | None = None
    """The header Retry-After."""


class Question:
    """One request, sent when this is made, whose answer is taken later."""

    def __init__(
        self,
        url: str,
        body: dict[str, Any] | None = None,
        timeout: float = CONNECT_TIMEOUT,
        key: str | None = None,
    ) -> None:
        """A GET if there is no body. `key`: sent as the API key.

        Raises:
            UnreachableError: nobody listens there, or not in this protocol.
            NoAnswerError: no connection within `timeout` seconds.
        """
        self._url = url = url if "://" in url else f"http://{url}"
        self._connection: http.client.HTTPConnection | None = None
        # The connection must not stay: Triton waits for idle ones when it ends.
        headers = {"Connection": "close", "Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            parts = urlsplit(url)
            makers = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
            if parts.scheme not in makers or not parts.hostname:
                raise ValueError("an address is http://HOST:PORT")
            self._connection = makers[parts.scheme](parts.hostname, parts.port, timeout=timeout)
            text = None if body is None else json.dumps(body).encode()
            self._connection.request("GET" if text is None else "POST", parts.path or "/", text, headers)
        except TimeoutError:
            self.close()
            raise NoAnswerError(f"{url} took no connection within {timeout:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise UnreachableError(f"can't reach {url}: {explained(error, url)}") from None

    @property
    def answered(self) -> bool:
        """The answer, or the end of the connection, is there."""
        assert self._connection is not None
        poll = select.poll()
        poll.register(self._connection.sock, select.POLLIN)
        return bool(poll.poll(0))

    def response(self, timeout: float) -> Answer:
        """Waits for it, and closes. `timeout` is in seconds.

        Raises:
            UnreachableError: the connection broke.
            NoAnswerError: it did not come in time.
            TroubleError: it is longer than MAX_ANSWER.
        """
        assert self._connection is not None
        try:
            self._connection.sock.settimeout(timeout)
            response = self._connection.getresponse()
            content = response.read(MAX_ANSWER + 1)
            if len(content) > MAX_ANSWER:  # half of it would be taken for another's answer, or for fewer requests
                raise TroubleError(f"{self._url} answered with more than {MAX_ANSWER} bytes")
            return Answer(response.status, content, response.getheader("Retry-After"))
        except TimeoutError:
            raise NoAnswerError(f"{self._url} did not answer within {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(f"can't reach {self._url}: {explained(error, self._url)}") from None
        finally:
            self.close()

    def answer(self, timeout: float) -> bytes:
        """As `response`, of a Triton and if it is good. Raises one of the errors above."""
        status, content, _ = self.response(timeout)
        if status == 200:
            return content
        if status == NOT_ALLOWED:  # by a server that only answers GET
            raise TroubleError(f"{self._url} takes no commands: perhaps it is a port of metrics; {WHICH_PORT}")
        message = triton_error(content) or f"{self._url} answered with status {status}; is it a Tidewright server?"
        raise DeadStubError(message) if "Stub process" in message else TroubleError(message)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def triton_error(content: bytes) -> str | None:
    """The error that Triton gives as JSON; None if this is something else."""
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return error if isinstance(error, str) else None


def explained(error: Exception, url: str) -> str:
    """An error of a connection to `url`, with what the user can change if that is known."""
    text = str(error) or type(error).__name__
    if isinstance(error, http.client.BadStatusLine) and text.startswith("\0\0"):  # a frame of HTTP/2
        return f"it speaks HTTP/2, as Triton's gRPC port does; {WHICH_PORT}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{text}; if it is signed by a CA of your own, name the CA's PEM file in SSL_CERT_FILE"
    if isinstance(error, (http.client.BadStatusLine, ConnectionResetError)) and url.startswith("http:"):
        return f"{text}; if it speaks TLS, write https:// before its address"
    return text


def ask(url: str, body: dict[str, Any] | None, patience: float) -> Waiting[bytes]:
    """As `post`, without blocking: `patience` is how long the answer may take, in seconds."""
    began = time.monotonic()
    question = Question(url, body)
    try:
        while not question.answered:
            if time.monotonic() - began > patience:
                raise NoAnswerError(f"{url} did not answer within {patience:g} s")
            yield
        return question.answer(CONNECT_TIMEOUT)  # the rest of it
    finally:
        question.close()


def post(url: str, body: dict[str, Any], timeout: float) -> bytes:
    """The answer; raises one of the errors above."""
    return Question(url, body, timeout).answer(timeout)


def control(url: str, word: ControlWord, timeout: float, model: str = "decoder") -> None:
    """Returns if the answer is yes; raises one of the errors above. `timeout` is in seconds."""
    _control(url, word, timeout, model)


def told(url: str, word: str, timeout: float, model: str = "decoder") -> str:
    """What the answer to a control word says.

    Raises one of the errors above; TroubleError also if there is another answer than a decoder's.
    """
    try:
        return text_of(_control(url, word, timeout, model))
    except ValueError:
        raise TroubleError(f"{url} did not answer as the decoder does") from None


def text_of(answer: bytes) -> str:
    """What a decoder says in an answer of Triton. Raises ValueError: it is another's answer."""
    try:
        return str(json.loads(answer)["text_output"])
    except (KeyError, TypeError):
        raise ValueError("no answer of a decoder") from None


def _control(url: str, word: str, timeout: float, model: str) -> bytes:
    return post(f"{url}/v2/models/{model}/generate", {"control": word}, timeout)


def check_alive(url: str, timeout: float, model: str = "decoder") -> None:
    """Returns if the stub of a decoder answers, whatever it says of its engine; raises one of the errors above.

    Raises also TroubleError: the stub is stuck, or the decoder is not loaded.
    """
    status = told(url, "status", timeout, model)
    try:
        trouble = str(json.loads(status)["trouble"])
    except (ValueError, KeyError, TypeError):
        raise TroubleError(f"{url} did not answer as the decoder does") from None
    if trouble.startswith(STUCK):
        raise TroubleError(trouble)
