"""How the replies to one request become pieces, an answer, or an error; and whether it is tried again. No I/O."""

from __future__ import annotations

import random

from tidewright_client.deadline import Deadline
from tidewright_client.errors import ASK_AGAIN, Interrupted, TidewrightError, TimedOut
from tidewright_client.hooks import CallInfo, Hooks, tell
from tidewright_client.retries import Budget, wait_before
from tidewright_client.triton import wire
from tidewright_client.triton.faults import RETRIED
from tidewright_client.triton.order import Order
from tidewright_client.triton.pieces import Collector, Piece, TritonAnswer


class Reading:
    def __init__(
        self, order: Order, deadline: Deadline, max_retries: int, budget: Budget, hooks: Hooks, address: str
    ) -> None:
        self.order, self.deadline = order, deadline
        self._max_retries, self._budget, self._hooks = max_retries, budget, hooks
        self._info = CallInfo("generate", address, order.model, order.streams)
        self._reader = wire.Reader()
        prompt_tokens = None if order.input_ids is None else len(order.input_ids)
        self._collector = Collector(order.request_id, order.model, order.num_outputs, prompt_tokens)
        self._unfinished = order.num_outputs
        self._was_sent = self._has_ended = False
        self.has_begun = False

    def begins(self) -> None:
        """It is about to be sent, or sent again."""
        if not self._was_sent:
            self._was_sent = True
            tell(self._hooks.on_request, self._info)

    @property
    def traceparent(self) -> str:
        """A hook may have added one."""
        return self.order.traceparent or self._info.headers.get("traceparent", "")

    @property
    def is_finished(self) -> bool:
        return self._unfinished <= 0

    def take(self, reply: wire.Reply | None) -> list[Piece]:
        """`reply`: None after the last one. Raises TidewrightError."""
        if reply is None:
            raise Interrupted(
                f"Triton ended the answer without its last part; {ASK_AGAIN}", request_id=self.order.request_id
            )
        pieces = self._reader.pieces(reply)
        self._collector.add(pieces)
        if pieces and not self.has_begun:
            self.has_begun = True
            if self.order.streams:
                tell(self._hooks.on_first_token, self._info)
        self._unfinished -= sum(piece.finish_reason is not None for piece in pieces)
        return pieces

    def answer(self) -> TritonAnswer:
        """What came so far."""
        return self._collector.answer()

    def failed(self, error: TidewrightError) -> TidewrightError:
        """It ends with this error, which gets what came before."""
        error.request_id = error.request_id or self.order.request_id
        if self.has_begun or isinstance(error, Interrupted):
            error.partial = self.answer()
        self.ended(error)
        return error

    def ended(self, error: TidewrightError | None = None) -> None:
        """It is over, or its reader goes; what is said after the first time is ignored."""
        if self._was_sent and not self._has_ended:
            self._has_ended = True
            tell(self._hooks.on_end, self._info, None if error else self.answer(), error)

    def wait_after(self, error: TidewrightError) -> float | None:
        """Seconds until it is tried again; None if it is not."""
        if self.has_begun or not isinstance(error, RETRIED) or self._info.retries >= self._max_retries:
            return None
        wait = wait_before(self._info.retries, error.retry_after, self.deadline.left(), random.random)
        if wait is None or not self._budget.take():
            return None
        self._info.retries += 1
        tell(self._hooks.on_retry, self._info, error, wait)
        return wait


def silence(has_begun: bool, deadline: Deadline, idle_timeout: float | None) -> TidewrightError:
    """The error of a request for which nothing came within its limits."""
    if deadline.is_over:
        return TimedOut(f"the answer took longer than the timeout of {deadline.timeout:g} s")
    text = f"nothing came for {idle_timeout:g} s (idle_timeout); see the server's log"
    return Interrupted(f"{text}; {ASK_AGAIN}") if has_begun else TimedOut(text)
