"""The messages of /v1/stream, which docs/websocket.md describes; a test holds that page against these types."""

from __future__ import annotations

from typing import Annotated, Any, Union

import msgspec
from msgspec import UNSET, UnsetType

from tidewright_gateway.openai.errors import ApiError, invalid

Id = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Credits = Union[Count, None, UnsetType]  # noqa: UP007 - msgspec reads it at run time, on Python 3.10 too


class _Message(msgspec.Struct, tag=str.lower, tag_field="type", forbid_unknown_fields=True, omit_defaults=True):
    pass


class Open(_Message):
    """The first message of a connection."""

    token: str | None = None
    credits: Credits = UNSET
    """Of generations that name none of their own."""


class Generate(_Message):
    id: Id
    request: msgspec.Raw
    """A body of /v1/chat/completions or /v1/completions."""
    credits: Credits = UNSET


class Credit(_Message):
    id: Id
    tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class Cancel(_Message):
    id: Id


class Resume(_Message):
    id: Id
    resume_token: str
    received: list[Count] = []
    """The last `seq` of each choice."""
    credits: Credits = UNSET


class Ping(_Message):
    pass


class Opened(_Message):
    model: str
    max_generations: int
    max_message: int  # bytes
    idle_timeout: float  # seconds
    resume_grace: float  # seconds


class Started(_Message):
    id: str
    request_id: str
    resume_token: str


class Token(_Message):
    id: str
    index: int
    seq: int
    text: str
    token_ids: list[int]
    logprobs: list[msgspec.Raw] | None = None


class Done(_Message):
    id: str
    choices: list[ChoiceEnd]
    usage: dict[str, int]
    served_by: str = ""
    limited_by: str | None = None
    error: Failure | None = None


class Error(_Message):
    status: int
    code: str
    message: str
    id: str | None = None
    param: str | None = None
    retry_after: float | None = None  # seconds

    @classmethod
    def of(cls, error: ApiError, id: str | None) -> Error:
        return cls(error.status, error.code, str(error), id, error.param, error.retry_after)


class Pong(_Message):
    pass


class ChoiceEnd(msgspec.Struct, omit_defaults=True):
    """A part of `done`."""

    index: int
    seq: int
    finish_reason: str | None
    ended_by: str | None = None


class Failure(msgspec.Struct, omit_defaults=True):
    """A part of `done`."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None  # seconds

    @classmethod
    def of(cls, error: ApiError) -> Failure:
        return cls(error.status, error.code, str(error), error.param, error.retry_after)


CLIENT = (Open, Generate, Credit, Cancel, Resume, Ping)
SERVER = (Opened, Started, Token, Done, Error, Pong)

FromClient = Union[Open, Generate, Credit, Cancel, Resume, Ping]  # noqa: UP007 - as above
FromServer = Union[Opened, Started, Token, Done, Error, Pong]  # noqa: UP007

_NAMES = [kind.__name__.lower() for kind in CLIENT]
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(FromClient)


class _Head(msgspec.Struct):
    type: Any = None
    id: Any = None


class BadMessageError(Exception):
    """A message that can't be used."""

    def __init__(self, error: ApiError, id: str | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.id = id  # of the generation that it names, if it can be read


def encode(message: FromServer) -> str:
    return _encoder.encode(message).decode()


def decode(text: str) -> FromClient:
    """
    Raises:
        BadMessageError: it is none of the messages above; says why.
    """
    try:
        return _decoder.decode(text)
    except msgspec.ValidationError as error:
        head = _head(text)
        named = head.id if isinstance(head.id, str) and len(head.id) <= 128 else None
        message, _, place = str(error).partition(" - at `$.")
        param = place.rstrip("`") or None
        if head.type not in _NAMES:
            message, param = f"type must be one of {', '.join(_NAMES)}", "type"
        else:
            message = f"{head.type}: {message}"
        raise BadMessageError(invalid(message, param), named) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadMessageError(invalid(f"the message is not JSON: {error}", code="invalid_json")) from None


def _head(text: str) -> _Head:
    try:
        return msgspec.json.decode(text, type=_Head)
    except (msgspec.MsgspecError, RecursionError):  # such as an array
        return _Head()
