"""The requests in flight, from the moment they are taken to their end, which comes exactly once.

The engine client's thread delivers tokens, and the sender's makes responses of them. Whoever else ends a request leaves
an error with it: only the sender answers a request once it was taken.
"""

from __future__ import annotations

import contextlib
import logging
import threading

from tidewright.bridge.active_request import ActiveRequest
from tidewright.bridge.answers import Answers
from tidewright.bridge.feeder import Feeder
from tidewright.bridge.outgoing import Job, Outgoing, Reply
from tidewright.bridge.output_sequence import OutputSequence
from tidewright.bridge.sender import Sender
from tidewright.engine.messages import SequenceOutput
from tidewright.errors import CancelledError, InvalidRequestError, OverloadedError, RequestError
from tidewright.schema import attempt_of

log = logging.getLogger(__name__)


class RequestsInFlight:
    """`changed` guards all of it, and is notified of each new request."""

    def __init__(self, limit: int, answers: Answers, feeder: Feeder) -> None:
        """`limit`: sequences that may run and wait."""
        self._limit, self._answers, self._feeder = limit, answers, feeder
        self.active: dict[ActiveRequest, None] = {}  # in order of arrival
        self.sequences: dict[int, OutputSequence] = {}  # that have not ended, by the engine's request id
        self.changed = threading.Condition()
        self.outgoing = Outgoing(self.changed)
        self.sender = Sender(self.changed, self.outgoing, self._send, self._abandon, self._release)

    def check_room(self, n: int) -> None:
        """With `changed` held: raises RequestError if n more sequences are too many."""
        if n > self._limit:
            raise InvalidRequestError(
                f"n is {n}, but only {self._limit} sequences (max_running + max_waiting) may be in flight"
            )
        if len(self.sequences) + n > self._limit:
            raise OverloadedError(
                f"{len(self.sequences)} requests are running or waiting, each of n counted, and max_running + "
                f"max_waiting allow {self._limit}; try again later"
            )

    def add(self, request: ActiveRequest) -> None:
        """With `changed` held. The engine gets its sequences from the caller."""
        self.active[request] = None
        self.sequences.update((sequence.engine_request_id, sequence) for sequence in request.sequences)
        self.changed.notify_all()

    def reply(self, reply: Reply) -> None:
        with self.changed:
            self.sender.add(reply, urgent=True)

    def take_outputs(self, outputs: list[SequenceOutput]) -> None:
        """What the engine has computed."""
        with self.changed:
            for output in outputs:
                sequence = self.sequences.get(output.request_id)
                if sequence is None:
                    continue
                is_first = not sequence.has_new_tokens
                sequence.arrived.append(output)
                sequence.token_ids += output.token_ids
                sequence.progressed = True
                if sequence.deaths:
                    self._feeder.acquit(sequence)
                self._wake_sender(sequence.request, urgent=is_first or output.finish_reason is not None)

    def fail(self, request: ActiveRequest, error: RequestError) -> None:
        """Lets the sender end it with an error, unless it has one."""
        with self.changed:
            request.error = request.error or error
            self._wake_sender(request, urgent=True)

    def fail_all(self, error: RequestError) -> None:
        with self.changed:
            for request in self.active:
                self.fail(request, error)

    def cancel(self, client_id: str) -> int:
        """Ends the requests of that id, or that attempt at one; how many they are."""
        with self.changed:
            found = [request for request in self.active if attempt_of(request.client_id, client_id)]
            for request in found:
                self.fail(request, CancelledError("cancelled by its id"))
        return len(found)

    def end_overdue(self, before: float, why: str) -> None:
        """Ends those whose deadline was earlier, although no engine has."""
        with self.changed:
            for request in self.active:
                if request.deadline is not None and request.deadline < before:
                    request.end_overdue(why)
                    self._wake_sender(request, urgent=True)

    def waiting_since(self, count: int) -> float | None:
        """When the first of the `count` requests that wait arrived; None if there is none."""
        with self.changed:
            # In order of arrival, and so do they begin: those that wait are the last of those without a token.
            arrived = [
                request.arrived_at
                for request in self.active
                if not any(sequence.has_new_tokens for sequence in request.sequences)
            ]
        return arrived[-count:][0] if count and arrived else None

    def longest(self, generates: bool) -> int:
        """Tokens of prompt and, if it `generates`, output of one, at most."""
        with self.changed:
            requests = [request.parsed for request in self.active]
        return max((len(one.prompt_token_ids) + generates * one.sampling.max_tokens for one in requests), default=0)

    def _wake_sender(self, request: ActiveRequest, urgent: bool) -> None:
        """With `changed` held. An ended request must not be answered again, as when a cancel is noticed meanwhile."""
        if request in self.active:
            self.sender.add(request, urgent)

    def _send(self, job: Job) -> None:
        if isinstance(job, Reply):
            try:
                job.send()
            except Exception:
                log.exception("an answer could not be sent")
            return
        with self.changed:
            arrived = [sequence.arrived for sequence in job.sequences]
            for sequence in job.sequences:
                sequence.arrived = []
        try:
            reason = self._answers.answer(job, arrived)
        except Exception:
            log.exception("a request could not be answered")
            with contextlib.suppress(Exception):  # it may have ended before it went wrong
                job.responder.fail(RequestError("the response could not be made; see the server's log"))
            reason = RequestError.reason
            self._answers.ended(job, reason)
        self._forget(job, job.sequences if reason else [sequence for sequence in job.sequences if sequence.over])

    def _abandon(self, job: Job) -> None:
        """Triton does not take its response: end it here. Should the send return, it ends there too, with an error."""
        if isinstance(job, ActiveRequest):
            with self.changed:
                job.error = job.error or CancelledError("cancelled: its caller took no response")
                self._answers.ended(job, CancelledError.reason)
                job.abandoned = True
            self._forget(job, job.sequences)

    def _release(self, job: Job) -> None:
        """With `changed` held: a send that took long is over."""
        if isinstance(job, ActiveRequest):
            self._wake_sender(job, urgent=True)

    def _forget(self, request: ActiveRequest, ended: list[OutputSequence]) -> None:
        """Drop sequences that have ended here, and abort those that the engine still has."""
        with self.changed:
            dropped = [sequence for sequence in ended if self.sequences.pop(sequence.engine_request_id, None)]
            if len(ended) == len(request.sequences):
                self.active.pop(request, None)
                self.outgoing.discard(request)
        for sequence in dropped:
            self._feeder.drop(sequence)
