"""The responses of all keys that can be retrieved, continued, cancelled and deleted: stored ones, and running ones."""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass
from typing import Any

from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.errors import MAX_SHOWN, ApiError, invalid
from tidewright_gateway.openai.responses.answer import ResponsesAnswer
from tidewright_gateway.openai.responses.items import RESPONSE, response_of
from tidewright_gateway.openai.responses.store import ResponseStore, StoredResponse, StoreLostError, encode

log = logging.getLogger(__name__)

_ID = re.compile(rf"{RESPONSE}_[0-9a-f]{{48}}")


@dataclass(frozen=True)
class _Running:
    context: RequestContext
    answer: ResponsesAnswer
    task: asyncio.Task[Any]

    def cancel(self) -> None:
        self.answer.cancel()
        self.context.ended_by = ApiError(499, "the response was cancelled", code="cancelled")
        self.task.cancel()


class Shelf:
    def __init__(self, store: ResponseStore, max_bytes: int) -> None:
        """`max_bytes`: of a conversation that is continued, as of one that is sent."""
        self.store, self._max_bytes = store, max_bytes
        self._running: dict[str, _Running] = {}

    @property
    def keeps(self) -> bool:
        """Responses are stored."""
        return not self.store.why_not

    def run(self, context: RequestContext, answer: ResponsesAnswer) -> None:
        """The answer runs in the current task, until that ends."""
        task = asyncio.current_task()
        assert task
        self._running[answer.id] = _Running(context, answer, task)
        task.add_done_callback(lambda _: self._running.pop(answer.id, None))

    async def keep(self, key_id: str, response_id: str, stored: StoredResponse) -> None:
        """An answer that can't be stored is given all the same."""
        try:
            await self.store.put(key_id, response_id, stored)
        except StoreLostError as error:
            log.error("response %s is not stored: %s", response_id, error)

    async def previous(self, key_id: str, response_id: str) -> StoredResponse:
        """The one that a request continues. Raises ApiError: there is none."""
        if not self.keeps:
            raise invalid(f"previous_response_id: {self.store.why_not}; send all items", "previous_response_id")
        found = await self._stored(key_id, response_id)
        if found is None and self._find_running(key_id, response_id):
            raise invalid(f"previous_response_id: {_still_running(response_id)}", "previous_response_id")
        if found is None:
            message = f"previous_response_id: {_not_found(response_id)}; send all items as input"
            raise invalid(message, "previous_response_id", "previous_response_not_found")
        if (size := len(encode(found))) > self._max_bytes:
            message = f"previous_response_id: its conversation has {size} bytes, more than {self._max_bytes} (max_body)"
            raise invalid(f"{message}; send the items that matter as input", "previous_response_id")
        return found

    async def item(self, key_id: str, item_id: str) -> dict[str, Any] | None:
        """An item of the output of a stored response; None if there is none. Raises ApiError: the store is lost."""
        response_id = response_of(item_id)
        found = await self._stored(key_id, response_id) if response_id else None
        output = found.response["output"] if found else ()
        return next((item for item in output if item["id"] == item_id), None)

    async def response(self, key_id: str, response_id: str) -> dict[str, Any]:
        """The Response object. Raises ApiError: there is none."""
        if running := self._find_running(key_id, response_id):
            return running.answer.response()
        return (await self.stored(key_id, response_id)).response

    async def stored(self, key_id: str, response_id: str) -> StoredResponse:
        """Raises ApiError: there is none."""
        if found := await self._stored(key_id, response_id):
            return found
        if self._find_running(key_id, response_id):
            raise invalid(_still_running(response_id), "response_id")
        raise ApiError(404, f"{_not_found(response_id)}{self._hint}", code="response_not_found", param="response_id")

    async def delete(self, key_id: str, response_id: str) -> None:
        """Raises ApiError: there is none that has ended."""
        if running := self._find_running(key_id, response_id):
            if running.answer.status != "cancelled":
                raise invalid(f"{_still_running(response_id)}; cancel it first", "response_id")
            running.answer.forget()
            del self._running[response_id]
            return
        await self.stored(key_id, response_id)
        try:
            await self.store.delete(key_id, response_id)
        except StoreLostError:
            raise _lost() from None

    async def cancel(self, key_id: str, response_id: str) -> dict[str, Any]:
        """The Response object. Raises ApiError: none of this worker's runs under this id."""
        running = self._find_running(key_id, response_id)
        if running is None:
            status = (await self.stored(key_id, response_id)).response["status"]
            raise invalid(f"response {response_id} has ended ({status}); only a running one can be cancelled")
        if running.answer.status != "cancelled":
            running.cancel()
        return running.answer.response()

    def _find_running(self, key_id: str, response_id: str) -> _Running | None:
        """None also if it has ended, though its last bytes are not sent yet."""
        running = self._running.get(response_id)
        if running is None or running.context.caller.key_id != key_id:
            return None
        has_ended = running.answer.is_over and running.answer.status != "cancelled"
        return None if has_ended else running

    async def _stored(self, key_id: str, response_id: str) -> StoredResponse | None:
        if not _ID.fullmatch(response_id):
            return None
        try:
            return await self.store.get(key_id, response_id)
        except StoreLostError:
            raise _lost() from None

    @property
    def _hint(self) -> str:
        return f" ({self.store.why_not})" if self.store.why_not else ""


def _not_found(response_id: str) -> str:
    name = response_id[:MAX_SHOWN]
    return f"this key has no response with the id {name!r}; it was not stored, was deleted, or has expired"


def _still_running(response_id: str) -> str:
    return f"response {response_id} is still running"


def _lost() -> ApiError:
    message = "stored responses can't be reached right now; try again"
    return ApiError(503, message, code="responses_unavailable", retry_after=1)
