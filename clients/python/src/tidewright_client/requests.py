"""The requests that a client makes: their paths and bodies. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, TypedDict

from tidewright_client import checks
from tidewright_client.errors import InvalidRequest

Messages = Sequence[Mapping[str, Any]]
"""A chat so far, as OpenAI's API has it."""


class CompletionOptions(TypedDict, total=False):
    """Of `complete` and `stream_complete`. What is not given is left to the server."""

    model: str
    """As `models()` lists them; not needed if the client has one."""
    max_tokens: int
    temperature: float
    top_p: float
    stop: str | Sequence[str]
    seed: int
    user: str
    priority: int
    timeout: float | EllipsisType | None
    """Seconds from the call to the last byte, retries included; None for no end. Default: the client's."""
    extra: Mapping[str, Any]
    """Further fields of the body, as docs/gateway-api.md lists them; they win."""


class ChatOptions(CompletionOptions, total=False):
    """Of `chat` and `stream_chat`."""

    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    response_format: Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    operation: str
    path: str
    body: dict[str, Any] | None = None
    """None for a GET."""
    is_stream: bool = False
    timeout: float | EllipsisType | None = ...
    """Ellipsis: the client's."""
    is_retried: bool = True

    @property
    def model(self) -> str | None:
        return None if self.body is None else self.body.get("model")


MODELS = Request("models", "/v1/models")
HEALTH = Request("health", "/health/ready", is_retried=False)  # "not now" is its answer


def chat(messages: Messages, options: ChatOptions, model: str | None, is_stream: bool) -> Request:
    """`model`: the client's. Raises InvalidRequest, TypeError."""
    if not isinstance(messages, Sequence) or not all(isinstance(one, Mapping) for one in messages):
        raise TypeError('messages must be a list like [{"role": "user", "content": "Hi"}]')
    return _generation("chat", {"messages": [dict(one) for one in messages]}, options, ChatOptions, model, is_stream)


def completion(prompt: str, options: CompletionOptions, model: str | None, is_stream: bool) -> Request:
    """As `chat`."""
    return _generation("complete", {"prompt": prompt}, options, CompletionOptions, model, is_stream)


def _generation(
    operation: str,
    body: dict[str, Any],
    options: CompletionOptions,
    allowed: type,
    model: str | None,
    is_stream: bool,
) -> Request:
    given: dict[str, Any] = dict(options)
    if unknown := sorted(given.keys() - allowed.__annotations__.keys() - CompletionOptions.__annotations__.keys()):
        raise TypeError(f"{operation} has no argument {unknown[0]!r}; other fields of the body go into extra={{...}}")
    timeout, extra = given.pop("timeout", ...), given.pop("extra", None) or {}
    body = {"model": model, **body, **{name: value for name, value in given.items() if value is not None}}
    if is_stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    body |= extra
    if not body["model"]:
        raise InvalidRequest(
            "no model is named: give model=..., here or to the client; models() lists them", param="model"
        )
    if body.get("n") not in (None, 1):
        raise InvalidRequest("an Answer has one text: make a call for each, instead of n", param="n")
    if bool(body.get("stream")) != is_stream:
        raise InvalidRequest("stream_chat and stream_complete stream; extra must not name stream", param="stream")
    if timeout is not ...:
        checks.timeout_of_call(timeout)
    checks.json_values(body)
    paths = {"chat": "/v1/chat/completions", "complete": "/v1/completions"}
    return Request(operation, paths[operation], body, is_stream, timeout)
