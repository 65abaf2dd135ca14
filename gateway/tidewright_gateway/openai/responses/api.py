"""POST /v1/responses as one of the endpoints that generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from tidewright_gateway.context import RequestContext
from tidewright_gateway.models import Model
from tidewright_gateway.openai.answers import Answer
from tidewright_gateway.openai.api import Api
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.errors import MAX_SHOWN, ApiError, invalid
from tidewright_gateway.openai.messages import ChatMessage
from tidewright_gateway.openai.responses.answer import ResponsesAnswer
from tidewright_gateway.openai.responses.description import Description
from tidewright_gateway.openai.responses.items import Item, ItemReference
from tidewright_gateway.openai.responses.names import as_sent
from tidewright_gateway.openai.responses.request import ResponsesRequest
from tidewright_gateway.openai.responses.shelf import Shelf
from tidewright_gateway.openai.responses.store import StoredResponse
from tidewright_gateway.openai.responses.translation import input_items, to_chat
from tidewright_gateway.openai.responses.truncation import shortened

T = TypeVar("T")

_ROOM = 4  # the part of the context that a shortened prompt leaves to the answer, unless the request says how much
_items: TypeAdapter[list[Item]] = TypeAdapter(list[Annotated[Item, Field(discriminator="type")]])
_item: TypeAdapter[Item] = TypeAdapter(Annotated[Item, Field(discriminator="type")])


class ResponsesApi(Api[ResponsesRequest, ChatRequest]):
    kind = ResponsesRequest

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._previous: list[dict[str, Any]] = []
        """Items of the earlier responses."""
        self._own: list[Item] = []
        self._has_translated = False

    async def translate(self, context: RequestContext, body: ResponsesRequest) -> ChatRequest:
        if body.previous_response_id is not None:
            stored = await self._shelf.previous(context.caller.key_id, body.previous_response_id)
            self._previous = stored.items
        self._body, self._own = body, await self._resolved(context.caller.key_id, input_items(body))
        previous = _read(_items, self._previous, "previous_response_id")
        request = to_chat(body, [*previous, *self._own], len(previous))
        if body.truncation == "auto":
            messages = await shortened(request.messages, lambda messages: _fits(context.served, request, messages))
            request = request.model_copy(update={"messages": messages})
        self._has_translated = True
        return request

    def as_sent(self, error: ApiError) -> ApiError:
        return as_sent(error) if self._has_translated else error  # about the chat request, once there is one

    async def _resolved(self, key_id: str, items: Sequence[Item | ItemReference]) -> list[Item]:
        """The items, with those that are referred to in their places."""
        found: list[Item] = []
        for number, item in enumerate(items):
            if isinstance(item, ItemReference):
                if (stored := await self._shelf.item(key_id, item.id)) is None:
                    place = f"input.{number}.id"
                    message = f"{place}: this key has no stored response with the item {item.id[:MAX_SHOWN]!r}"
                    raise invalid(f"{message}; send the item itself", place)
                item = _read(_item, stored, f"input.{number}.id")
            found.append(item)
        return found

    def answer(self, context: RequestContext, request: ChatRequest) -> Answer:
        is_stored = self._shelf.keeps and self._body.store is not False
        prompts = context.served.prompts
        description = Description.of(self._body, prompts.dialect.defaults, is_stored=is_stored)
        key_id = context.caller.key_id

        async def keep(answer: ResponsesAnswer) -> None:
            items = [*self._previous, *(item.shown() for item in self._own)]
            await self._shelf.keep(key_id, answer.id, StoredResponse(answer.response(), items))

        answer = ResponsesAnswer(context, request, prompts, description, keep if is_stored else None)
        self._shelf.run(context, answer)
        return answer


def _read(kind: TypeAdapter[T], stored: Any, place: str) -> T:
    """What was stored, perhaps by a gateway of another version. Raises ApiError."""
    try:
        return kind.validate_python(stored)
    except ValidationError:
        message = (
            f"{place}: it was stored by another version of the gateway, and can't be read; send all items as input"
        )
        raise invalid(message, place) from None


async def _fits(model: Model, request: ChatRequest, messages: list[ChatMessage]) -> bool:
    limit = model.failover.max_model_len
    room = min(request.max_tokens or limit // _ROOM, limit - 1)
    try:
        prompt = await model.prompts.of_chat(request.model_copy(update={"messages": messages}), limit)
    except ApiError as error:
        if error.code != "context_length_exceeded":
            raise
        return False
    return len(prompt.token_ids) + room <= limit
