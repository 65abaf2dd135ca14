"""What a program can be told of its calls: for metrics, logs and traces (otel.py has the latter ready)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tidewright_client.answers import Answer
from tidewright_client.errors import TidewrightError

log = logging.getLogger("tidewright_client")


@dataclass
class CallInfo:
    """A call, from its beginning to its end. Hooks may keep what they like in `state`."""

    operation: str
    """`chat`, `complete`, `models` or `health`; of a TritonClient `generate`."""
    url: str
    model: str | None
    is_stream: bool
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    """Of the next attempt. A hook may add some. Of a TritonClient only `traceparent` is sent, of a session nothing."""
    retries: int = 0
    state: dict[str, Any] = field(default_factory=dict)


class Hooks:
    """Does nothing; override what you need. They run in the caller's thread or event loop, or in that of a session,
    whose other generations wait meanwhile: return soon.

    An exception in a hook is logged, and the call goes on.
    """

    def on_request(self, call: CallInfo) -> None:
        """A call begins."""

    def on_retry(self, call: CallInfo, error: TidewrightError, wait: float) -> None:
        """An attempt failed; the next begins after `wait` seconds."""

    def on_first_token(self, call: CallInfo) -> None:
        """The first event of a stream has come."""

    def on_end(self, call: CallInfo, answer: Answer | None, error: TidewrightError | None) -> None:
        """Once for each call. A stream that was closed early has an `answer` without a finish_reason."""


def tell(hook: Callable[..., None], *arguments: object) -> None:
    try:
        hook(*arguments)
    except Exception:
        log.exception("a hook failed")
