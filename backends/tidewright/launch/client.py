"""A small client of a running server: tokenize a chat, stream an answer. HTTP only, no terminal."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import httpx

from tidewright.launch.errors import LaunchError

_JSON = {"Content-Type": "application/json"}

# Nothing may come for a while before the first token (a long queue, a long prompt).
_TIMEOUT = httpx.Timeout(10, read=300)


class RequestFailedError(LaunchError):
    """The server can't be reached, or refused the request; the message is for the user."""


class Client:
    """One server, by its HTTP address."""

    def __init__(self, url: str) -> None:
        """`url`: of Triton's HTTP port; http:// may be left out."""
        self._url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._http = httpx.Client(timeout=_TIMEOUT)

    def close(self) -> None:
        self._http.close()

    def tokenize_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the messages in the model's chat template."""
        data = json.dumps(messages, ensure_ascii=False)
        inputs = [{"name": "messages", "shape": [1, 1], "datatype": "BYTES", "data": [data]}]
        try:
            response = self._http.post(
                f"{self._url}/v2/models/tokenizer/infer", content=_to_json({"inputs": inputs}), headers=_JSON
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        self._raise_for_status(response)
        try:
            token_ids: list[int] = response.json()["outputs"][0]["data"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise RequestFailedError(f"{self._url} is no Tidewright server: its tokenizer returned no ids") from None
        return token_ids

    def generate(self, prompt: str | list[int], sampling: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Responses to a prompt (text or token ids) as they come. Closing the iterator cancels the request.

        It calls the decoder itself: through Triton's ensembles a cancellation gets lost.
        """
        body = {
            "text_input" if isinstance(prompt, str) else "input_ids": prompt,
            "stream": True,
            "return_finish_reason": True,
            "sampling_parameters": json.dumps(sampling),
        }
        try:
            with self._http.stream(
                "POST", f"{self._url}/v2/models/decoder/generate_stream", content=_to_json(body), headers=_JSON
            ) as response:
                if response.is_error:
                    response.read()
                self._raise_for_status(response)
                for event in _events(response.iter_bytes()):
                    if "error" in event:  # status 200 was sent before it went wrong
                        raise RequestFailedError(str(event["error"]))
                    yield event
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error

    def _raise_for_status(self, response: httpx.Response) -> None:
        if not response.is_error:
            return
        try:
            # An endpoint that streams sends its refusal as an event, too.
            error = json.loads(response.content.removeprefix(b"data:"))["error"]
        except (ValueError, KeyError, TypeError):
            error = f"the server answered with status {response.status_code}; is it a Tidewright server?"
        if isinstance(error, dict):  # OpenAI's shape
            error = (
                f"{self._url} is an OpenAI-compatible endpoint, such as Tidewright's gateway; give the address of "
                "Triton's HTTP port: --url http://127.0.0.1:8000"
            )
        raise RequestFailedError(str(error))

    def _unreachable(self, error: Exception) -> RequestFailedError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol | httpx.InvalidURL):
            return RequestFailedError(
                f"no server at {self._url} ({error}); start one with: tidewright serve, or give its address with --url"
            )
        if isinstance(error, httpx.ReadTimeout):
            return RequestFailedError(f"{self._url} sent nothing for {_TIMEOUT.read:g} s; see the server's log")
        return RequestFailedError(f"the connection to {self._url} broke: {error}; see the server's log")


def _to_json(value: Any) -> bytes:
    """UTF-8, in which a byte of the command line that was none becomes a question mark."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace")


def _events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Server-sent events. Lines end with a newline only: httpx's own `iter_lines` also cuts at U+2028 in a text."""
    pending = b""
    for chunk in chunks:
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                try:
                    yield json.loads(line.removeprefix(b"data:"))
                except ValueError:
                    raise RequestFailedError("the server sent an event that is not JSON") from None
