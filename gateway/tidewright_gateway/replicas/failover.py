"""Runs a generation on a replica, and resumes it on another one, or on a fallback, when that one fails.

Replies are forwarded as they arrive. The next attempt gets the prompt and the tokens already forwarded, so the stream
continues after them: with the same seed the same tokens (exactly so in float32), from the fallback different ones.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tidewright.logs import event
from tidewright.resilience.breaker import Permit, State
from tidewright.resilience.budget import RetryBudget
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.degradation import Route
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.resilience.retry import NoRetry
from tidewright.resilience.succession import FINAL, LOST, failed_at_fallback, fallback_can_go_on, fallback_may_answer
from tidewright.schema import SamplingParams
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.replicas.adapters import Adapters
from tidewright_gateway.replicas.health import Expected
from tidewright_gateway.replicas.replica import DECODER, FALLBACK, Attempt, Replica
from tidewright_gateway.replicas.replica_set import WATCH_INTERVAL, ReplicaLoad, ReplicaSet
from tidewright_gateway.replicas.triton import CallRequest, Reply
from tidewright_gateway.tracing.context import TraceContext
from tidewright_gateway.tracing.record import NO_RECORD, AttemptNote, Record

log = logging.getLogger(__name__)

MAX_FALLBACKS = 2  # attempts at fallbacks per generation


@dataclass
class Generation:
    """One output of one prompt, until it ends."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    deadline: Deadline
    logprobs: bool = False
    trace: TraceContext | None = None
    record: Record = NO_RECORD
    """Where its attempts are noted, for spans."""
    index: int = 0
    """Among those of its request."""
    embeds: bool = False
    """Its output is the prompt's embedding, in one reply."""
    delivered: list[int] = field(default_factory=list)
    """Tokens already forwarded."""
    served_by: list[str] = field(default_factory=list)
    """Addresses of the replicas that were tried, in order."""
    model: str = DECODER
    """The model of the last attempt: decoder or fallback."""


@dataclass
class _Course:
    """The attempts of one generation so far."""

    failures: int = 0
    """Failures of the decoder since the last token."""
    decoder_failed: bool = False
    """No decoder is tried any more."""
    asked_fallbacks: list[str] = field(default_factory=list)
    cause: ModelError | None = None
    """The error for the caller if all attempts fail."""


class Failover:
    def __init__(
        self,
        settings: GatewaySettings,
        metrics: Metrics,
        expected: Expected,
        max_model_len: int,
        decoder: str = DECODER,
    ) -> None:
        """`max_model_len`: the model's context in tokens; replicas may have less. `decoder`: its name in Triton."""
        self._settings, self._metrics = settings, metrics
        self._max_model_len = max_model_len
        self._set = ReplicaSet(settings, metrics, expected, decoder)
        self._retries = settings.retry_policy()
        self._budget = RetryBudget(settings.budget_config(), time.monotonic())

    async def start(self) -> None:
        """Checks each replica once, then keeps checking. Call it in the event loop, which gRPC binds channels to."""
        await self._set.start()

    async def stop(self) -> None:
        await self._set.stop()

    @property
    def adapters(self) -> Adapters:
        """LoRA adapters of the replicas."""
        return self._set.adapters

    @property
    def replicas(self) -> list[Replica]:
        return self._set.replicas

    @property
    def trouble(self) -> str:
        """Why no replica is usable, for operators; empty if one is."""
        return self._set.trouble

    @property
    def capacity(self) -> int | None:
        """Total batch size of the replicas, in sequences; None if unknown."""
        return self._set.capacity

    @property
    def max_model_len(self) -> int:
        """Context that every replica has, in tokens."""
        return self._set.max_model_len(self._max_model_len)

    async def change(self, replica: Replica, load: bool) -> None:
        """Loads or unloads its model there. Raises ModelError: it could not be done."""
        await self._set.change(replica, load)

    async def drain(self, replica: Replica) -> None:
        """Ends it gently. Raises ModelError: it did not accept that."""
        await self._set.drain(replica)

    @property
    def embedding_sizes(self) -> set[int]:
        """Of the replicas known: numbers in an embedding, 0 for one that generates text."""
        return self._set.embedding_sizes

    def snapshot(self) -> list[dict[str, Any]]:
        """Each replica for people; times in seconds."""
        return self._set.snapshot()

    def retry_budget(self, now: float) -> float:
        """Retries that may be made now."""
        return self._budget.balance(now)

    def load(self) -> ReplicaLoad:
        """Current load of the replicas."""
        return self._set.load()

    async def generate(self, generation: Generation, route: Route = Route.DECODER) -> AsyncGenerator[Reply, None]:
        """Yields replies; only the last one has a finish_reason. `route`: the model to try first.

        Raises:
            ModelError: no attempt succeeded. Replies already yielded stand.
        """
        self._budget.deposit()
        course = _Course()
        attempt = self._ask_fallback(generation, course) if route is Route.FALLBACK else None
        attempt = attempt or await self._ask_decoder(generation, course, None) or self._last_resort(generation, course)
        while True:
            try:
                while True:
                    reply = await attempt.read()
                    self._heard(generation, attempt, reply)
                    yield reply
                    if reply.finish_reason:
                        return
            except ModelError as error:
                failure = error
                attempt.outcome = error.outcome
            except (asyncio.CancelledError, GeneratorExit):
                self._record(attempt, Outcome.CANCELLED)
                attempt.outcome = attempt.outcome or Outcome.CANCELLED
                raise
            finally:
                self._leave(attempt)
                if generation.record.is_kept:
                    generation.record.tried(_note(generation, attempt))
            attempt = await self._next(generation, course, attempt, failure)

    def _heard(self, generation: Generation, attempt: Attempt, reply: Reply) -> None:
        generation.delivered += reply.token_ids
        if reply.finish_reason:
            attempt.outcome, attempt.timings = Outcome.SUCCESS, reply.timings
        permit, now, replica = attempt.permit, time.monotonic(), attempt.replica
        if permit is None:
            return
        replica.showed_life(now)
        if reply.embedding or (reply.token_ids and attempt.num_tokens == len(reply.token_ids)):
            self._set.generated(replica, now)
        # A probe reports at its first token: until then, the breaker lets nothing else through.
        if not permit.reported and (permit.is_probe or reply.finish_reason):
            replica.breaker.record(permit, Outcome.SUCCESS, now)
            if permit.is_probe and replica.breaker.state is State.CLOSED:
                replica.came_at = now
                log.info("the breaker is closed again", extra=event("breaker_closed", replica=replica.label))

    def _record(self, attempt: Attempt, outcome: Outcome) -> None:
        if attempt.permit:
            replica = attempt.replica
            before = replica.breaker.state
            replica.breaker.record(attempt.permit, outcome, time.monotonic())
            if replica.breaker.state is State.OPEN and before is not State.OPEN:
                extra = event("breaker_opened", replica=replica.label)
                log.warning("the breaker is open: %s", outcome.label, extra=extra)

    def _leave(self, attempt: Attempt) -> None:
        attempt.replica.attempts.discard(attempt)
        attempt.replica.fallbacks.discard(attempt)
        attempt.call.close()

    # The choice of the next attempt.

    async def _next(self, generation: Generation, course: _Course, failed: Attempt, error: ModelError) -> Attempt:
        """The attempt after a failed one. Raises ModelError: there is none."""
        self._metrics.attempt_failed(failed.replica.label, failed.model, error.outcome)
        # What is the caller's alone, or load, is no failure of a replica.
        is_refused = error.outcome is Outcome.OVERLOADED
        level = logging.DEBUG if error.outcome in FINAL else logging.INFO if is_refused else logging.WARNING
        did = "refused" if is_refused else "failed"
        address = failed.replica.label
        extra = event("attempt_failed", request_id=generation.request_id, replica=address)
        log.log(level, "%s of %s %s: %s", failed.model, address, did, error, extra=extra)
        self._record(failed, error.outcome)
        if failed.model == FALLBACK:
            return await self._after_fallback(generation, course, failed, error)
        is_missed = await self._set.adapters.is_missed(failed.replica, generation.sampling.lora_name, error)
        if is_missed:
            error = ModelError(str(error), Outcome.UNAVAILABLE)
        course.cause = error
        if error.outcome in FINAL:
            raise error
        if generation.deadline.expired(time.monotonic()):
            raise timed_out(error)
        if not is_missed:
            self._set.failed(failed.replica, error)
        course.failures = 1 if failed.num_tokens else course.failures + 1
        attempt: Attempt | None = None
        # A replica that says when it has room refuses the same again before that.
        is_useless = error.expected_wait is not None and not self._set.elsewhere(failed.replica, failed.adapter)
        if not is_useless and await self._may_ask_again(error, course.failures, generation.deadline):
            attempt = await self._ask_decoder(generation, course, error)
        elif generation.deadline.expired(time.monotonic()):
            raise timed_out(error)
        attempt = attempt or self._last_resort(generation, course)
        if generation.delivered:
            self._metrics.moved()
        return attempt

    async def _after_fallback(
        self, generation: Generation, course: _Course, failed: Attempt, error: ModelError
    ) -> Attempt:
        if error.outcome in LOST:
            failed.replica.fallback = None  # until its next status
        refused, error = error.outcome is Outcome.INVALID, failed_at_fallback(error)
        course.cause = course.cause or error
        if error.outcome in FINAL:
            raise error
        if generation.deadline.expired(time.monotonic()):
            raise timed_out(error)
        if failed.num_tokens:  # a second fallback would continue in different words
            raise course.cause
        if not refused and (attempt := self._ask_fallback(generation, course)):
            return attempt
        if course.decoder_failed or not (attempt := await self._ask_decoder(generation, course, error)):
            raise course.cause
        return attempt

    async def _may_ask_again(self, error: ModelError, failures: int, deadline: Deadline) -> bool:
        """Whether to try a decoder again; returns after the backoff."""
        if error.outcome is Outcome.ENGINE_KILLED:
            return False
        now = time.monotonic()
        if error.outcome in LOST and failures < self._retries.max_attempts:
            if deadline.expired(now):
                return False
            self._metrics.retried()
            return True
        delay = self._retries.next_delay(failures, now, deadline, random.random(), self._budget)
        if isinstance(delay, NoRetry):
            self._metrics.retry_refused(delay.value)
            return False
        self._metrics.retried()
        await asyncio.sleep(delay)
        return True

    async def _ask_decoder(self, generation: Generation, course: _Course, last: ModelError | None) -> Attempt | None:
        """Begins an attempt at a replica; waits for one if none is usable. None: use a fallback instead.

        Raises:
            ModelError: no replica became usable in time.
        """
        now = began = time.monotonic()
        until = min(now + self._settings.wait_for_replica, generation.deadline.at)
        avoid = generation.served_by[-1] if generation.served_by else ""
        adapter = generation.sampling.lora_name
        self._check_adapter(adapter)
        while not (chosen := self._set.choose(generation.prompt, avoid, now, generation.embeds, adapter)):
            self._check_adapter(adapter)
            waited_enough = now >= until or now - began >= self._settings.patience
            if waited_enough and self._fallback_for(generation, course):
                course.cause = course.cause or _nobody()
                return None
            if now >= until:
                error = last or course.cause or _nobody()
                raise timed_out(error) if generation.deadline.expired(now) else error
            await self._set.wait_for_change(min(until - now, WATCH_INTERVAL))
            now = time.monotonic()
        if now > began:
            generation.record.took("place", began, generation.index)
        replica, permit = chosen
        attempt = self._ask(generation, replica, DECODER, permit, now)
        attempt.is_last = course.failures + 1 >= self._retries.max_attempts
        replica.attempts.add(attempt)
        return attempt

    def _check_adapter(self, adapter: str | None) -> None:
        """Raises ModelError: it was unloaded since the request was admitted."""
        if adapter is not None and adapter not in self._set.adapters.loaded:
            raise ModelError(f"the LoRA adapter {adapter!r} was unloaded", Outcome.INVALID)

    def _last_resort(self, generation: Generation, course: _Course) -> Attempt:
        """Begins an attempt at a fallback after all decoders failed. Raises ModelError: there is none."""
        course.decoder_failed = True
        if attempt := self._ask_fallback(generation, course):
            return attempt
        raise course.cause or _nobody()

    def _fallback_for(self, generation: Generation, course: _Course) -> Replica | None:
        asked = course.asked_fallbacks
        if generation.embeds or not fallback_may_answer(generation.sampling):
            return None
        if len(asked) >= MAX_FALLBACKS or not fallback_can_go_on(generation.sampling, bool(generation.delivered)):
            return None
        return self._set.choose_fallback(len(generation.prompt) + len(generation.delivered), asked)

    def _ask_fallback(self, generation: Generation, course: _Course) -> Attempt | None:
        """Begins an attempt at a fallback, which has no breaker. None: there is none."""
        replica = self._fallback_for(generation, course)
        if replica is None:
            return None
        course.asked_fallbacks.append(replica.address)
        attempt = self._ask(generation, replica, FALLBACK, None, time.monotonic())
        replica.fallbacks.add(attempt)
        return attempt

    def _ask(self, generation: Generation, replica: Replica, model: str, permit: Permit | None, now: float) -> Attempt:
        sampling = generation.sampling
        if math.isfinite(generation.deadline.at):
            sampling = msgspec.structs.replace(sampling, timeout=generation.deadline.remaining(now))
        if not replica.knows_tenants:
            sampling = msgspec.structs.replace(sampling, tenant="", tenant_weight=1)  # which are not sent then
        if not replica.knows_targets:
            sampling = msgspec.structs.replace(sampling, ttft_target=None, tpot_target=None)
        trace = generation.trace
        if trace and generation.record.is_kept:
            trace = trace.child()
        request = CallRequest(
            generation.request_id,
            generation.prompt,
            msgspec.json.encode(sampling),
            list(generation.delivered),
            generation.logprobs,
            trace.metadata if trace else (),
            details=not generation.embeds and replica.tells_details,
            embeds=generation.embeds,
            traceparent=trace.traceparent if trace else "",
            timings=generation.record.is_kept and replica.tells_timings,
        )
        generation.served_by.append(replica.address)
        generation.model = model
        self._metrics.attempt(replica.label, model)
        call = replica.client.generate(replica.decoder if model == DECODER else model, request)
        attempt = Attempt(replica, model, call, permit, generation.deadline, generation.sampling.lora_name)
        if trace and generation.record.is_kept:
            attempt.span_id, attempt.began, attempt.tokens_before = trace.span_id, now, len(generation.delivered)
        return attempt


def _note(generation: Generation, attempt: Attempt) -> AttemptNote:
    return AttemptNote(
        attempt.span_id,
        generation.index,
        attempt.replica.address,
        attempt.model,
        attempt.began,
        time.monotonic(),
        attempt.tokens_before,
        attempt.num_tokens,
        attempt.outcome.label if attempt.outcome else "failed",
        attempt.timings,
    )


def _nobody() -> ModelError:
    return ModelError("no replica can take requests", Outcome.UNAVAILABLE)


def timed_out(error: ModelError) -> ModelError:
    """The error for a caller whose deadline passed, with the error it was waiting on."""
    return ModelError(f"request timed out: {error}", Outcome.REQUEST_TIMEOUT)
