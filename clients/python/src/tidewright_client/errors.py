"""The errors of the client. All have one base; each says what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidewright_client.answers import Answer


ASK_AGAIN = "ask again; partial has what came"
"""How the message of a broken stream ends."""


class TidewrightError(Exception):
    """Base of all errors of this package. The other fields are set as far as the server told them."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        said: str | None = None,
        partial: Answer | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after
        """Seconds."""
        self.said = said
        """The server's own words; `message` has them too, with what to do about it."""
        self.partial = partial
        """What had arrived of a stream that had begun; None if it had not."""


class InvalidRequest(TidewrightError):
    """The request is at fault: the same request fails again."""


def read_once() -> InvalidRequest:
    """Of a loop over a stream that is over."""
    return InvalidRequest("a stream can be read once, and this one is over: its answer() has what came")


class Unauthenticated(TidewrightError):
    """No API key, or one that the server does not know."""


class Forbidden(TidewrightError):
    """The key may not do this, or the server is not meant to be called by this name."""


class NotFound(TidewrightError):
    """No such model or path."""


class RateLimited(TidewrightError):
    """A limit of the key or of the server; `retry_after` says when to try again."""


class TimedOut(TidewrightError):
    """The request's timeout passed, here or on the server."""


class Unavailable(TidewrightError):
    """The server could not answer now."""


class ConnectionFailed(TidewrightError):
    """No connection, or it broke before an answer."""


class Interrupted(TidewrightError):
    """A stream that had begun ended without its end; `partial` is what had arrived."""


class UnexpectedAnswer(TidewrightError):
    """Not an answer of a gateway."""
