"""The replicas together: a generation runs at one of them, and goes on at another when that one fails.

A reply is handed on as it comes. What a further replica gets is the prompt and the tokens that were handed on, so the
stream goes on behind them: with the same seed the same tokens, exactly so in float32.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

import msgspec

from tidewright.failsafe.models import ModelError
from tidewright.resilience.breaker import Permit, Refusal
from tidewright.resilience.budget import RetryBudget
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.outcome import Outcome
from tidewright.resilience.retry import NoRetry
from tidewright.schema import DecoderStatus, SamplingParams
from tidewright_gateway.config import GatewaySettings, split_addresses
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.replica import Attempt, Replica
from tidewright_gateway.routing import Candidate, make_router
from tidewright_gateway.triton import Order, Reply

log = logging.getLogger(__name__)

PROBE_TIMEOUT = 2.0  # seconds; longer than Triton takes to say that a stub is dead
FRESH = 2.0  # seconds; what a replica said of its load before is not believed any more
WATCH_INTERVAL = 0.05  # seconds between two looks at what is in flight

# The request's own doing, or the same everywhere: nobody else is asked.
_FINAL = (Outcome.INVALID, Outcome.CANCELLED, Outcome.REQUEST_TIMEOUT)
# The replica is gone or says nothing: it computes no longer, so whoever goes on elsewhere adds no load.
_MOVES = (Outcome.UNAVAILABLE, Outcome.STALLED, Outcome.STUB_DIED)


@dataclass
class Task:
    """One generation, until it ends."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    deadline: Deadline
    logprobs: bool = False
    delivered: list[int] = field(default_factory=list)
    """Tokens that were handed on."""
    served_by: list[str] = field(default_factory=list)
    """Addresses of the replicas that were asked, in order."""


class Cluster:
    def __init__(self, settings: GatewaySettings, metrics: Metrics, max_model_len: int) -> None:
        """`max_model_len`: the model's own, in tokens."""
        self._settings, self._metrics = settings, metrics
        self._max_model_len = max_model_len
        self._router = make_router(settings.routing)
        self._retries = settings.retry_policy()
        self._budget = RetryBudget(settings.budget_config(), time.monotonic())
        self.replicas: list[Replica] = []
        self._jobs: list[asyncio.Task[None]] = []
        self._recovered = asyncio.Event()

    async def start(self) -> None:
        """Asks each replica once, and goes on asking. In the event loop: gRPC ties its channels to it."""
        settings = self._settings
        self.replicas = [
            Replica.at(address, settings.channels, settings.breaker_config())
            for address in split_addresses(settings.replicas)
        ]
        await asyncio.gather(*(self._probe(replica) for replica in self.replicas))
        self._jobs = [asyncio.create_task(self._probe_for_ever(replica)) for replica in self.replicas]
        self._jobs.append(asyncio.create_task(self._watch_for_ever()))

    async def stop(self) -> None:
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        for replica in self.replicas:
            await replica.client.close()

    @property
    def trouble(self) -> str:
        """Why no replica can be sent anything; empty if one can."""
        if any(replica.takes_requests for replica in self.replicas):
            return ""
        return "; ".join(f"{replica.address}: {replica.trouble or 'draining'}" for replica in self.replicas)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together that every replica takes."""
        lengths = [replica.status.max_model_len for replica in self.replicas if replica.status]
        return min(lengths, default=self._max_model_len)

    async def generate(self, task: Task) -> AsyncGenerator[Reply, None]:
        """To the last reply, which alone has a finish_reason.

        Raises:
            ModelError: it can't be ended; what was handed on stands.
        """
        self._budget.deposit()
        failures = 0  # since a token came
        last: ModelError | None = None
        while True:
            replica, attempt, permit = await self._begin(task, last)
            before = len(task.delivered)
            try:
                async with aclosing(attempt.generation.replies()) as replies:
                    async for reply in replies:
                        attempt.last_token = time.monotonic()
                        task.delivered += reply.token_ids
                        # At the first token: until a probe reports, nobody else gets through.
                        if not permit.reported and (permit.is_probe or reply.finish_reason):
                            replica.breaker.record(permit, Outcome.SUCCESS, attempt.last_token)
                        yield reply
                        if reply.finish_reason:
                            return
                last = ModelError("the replica ended the stream without a last reply", Outcome.ENGINE_FAILED)
            except ModelError as error:
                last = error
            except (asyncio.CancelledError, GeneratorExit):
                replica.breaker.record(permit, Outcome.CANCELLED, time.monotonic())
                raise
            finally:
                replica.attempts.discard(attempt)
            now = time.monotonic()
            replica.breaker.record(permit, last.outcome, now)
            if last.outcome in _FINAL:
                raise last
            failures = 1 if len(task.delivered) > before else failures + 1
            self._metrics.attempt_failed(replica.address, last.outcome)
            log.warning("%s: %s failed: %s", task.request_id, replica.address, last)
            if not await self._may_retry(last, failures, task.deadline):
                raise last
            if task.delivered:
                self._metrics.moved()

    async def _may_retry(self, error: ModelError, failures: int, deadline: Deadline) -> bool:
        """True when it is time for the next attempt."""
        now = time.monotonic()
        if error.outcome in _MOVES and failures < self._retries.max_attempts:
            return not deadline.expired(now)
        delay = self._retries.next_delay(failures, now, deadline, random.random(), self._budget)
        if isinstance(delay, NoRetry):
            self._metrics.retry_refused(delay.value)
            return False
        await asyncio.sleep(delay)
        return True

    async def _begin(self, task: Task, last: ModelError | None) -> tuple[Replica, Attempt, Permit]:
        """An attempt at a replica that can take it; waits for one if there is none.

        Raises:
            ModelError: there was none in time.
        """
        now = time.monotonic()
        until = min(now + self._settings.wait_for_replica, task.deadline.at)
        while True:
            if chosen := self._choose(task, now):
                replica, permit = chosen
                break
            if now >= until:
                raise last or ModelError(f"no replica can take requests ({self.trouble})", Outcome.UNAVAILABLE)
            self._recovered.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._recovered.wait(), min(until - now, WATCH_INTERVAL))
            now = time.monotonic()
        sampling = task.sampling
        if math.isfinite(task.deadline.at):
            sampling = msgspec.structs.replace(sampling, timeout=task.deadline.remaining(now))
        order = Order(task.request_id, task.prompt, msgspec.json.encode(sampling), list(task.delivered), task.logprobs)
        attempt = Attempt(replica.client.generate("decoder", order), now)
        replica.attempts.add(attempt)
        task.served_by.append(replica.address)
        self._metrics.attempt(replica.address)
        return replica, attempt, permit

    def _choose(self, task: Task, now: float) -> tuple[Replica, Permit] | None:
        able = [replica for replica in self.replicas if replica.takes_requests]
        # Another than the one that just failed, if there is one.
        able = [replica for replica in able if replica.address not in task.served_by[-1:]] or able
        refused: Replica | None = None
        while able:
            candidates = [_candidate(replica, now) for replica in able]
            replica = able[self._router.choose(candidates, task.prompt)]
            permit = replica.breaker.acquire(now)
            if not isinstance(permit, Refusal):
                return replica, permit
            refused = refused or replica
            able.remove(replica)
        # All are well but fail of late: one that may fail is better than none. No breaker counts this call.
        return (refused, Permit(-1, is_probe=False)) if refused else None

    async def _probe_for_ever(self, replica: Replica) -> None:
        while True:
            await asyncio.sleep(self._settings.probe_interval)
            try:
                await self._probe(replica)
            except Exception:
                log.exception("a replica could not be asked how it is")

    async def _probe(self, replica: Replica) -> None:
        was_able = replica.takes_requests
        replica.asked_at, replica.in_flight_when_asked = time.monotonic(), len(replica.attempts)
        try:
            answer = await replica.client.control("status", PROBE_TIMEOUT)
            status = msgspec.json.decode(answer, type=DecoderStatus)
            replica.heard(status, self._settings.patience, time.monotonic())
        except msgspec.MsgspecError as error:
            replica.lost(ModelError(f"is it a Tidewright server? {error}", Outcome.UNAVAILABLE))
        except ModelError as error:
            replica.lost(error)
        finally:
            replica.asked_at = None
        if replica.takes_requests != was_able:
            log.warning("%s: %s", replica.address, "is well" if not was_able else replica.trouble or "drains")
            self._recovered.set()
        self._metrics.replica_is(replica.address, replica.takes_requests)

    async def _watch_for_ever(self) -> None:
        """Ends attempts that take too long, so that they go on elsewhere."""
        settings, slept_at = self._settings, time.monotonic()
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            now = time.monotonic()
            if now - slept_at > settings.patience:  # it was this process that slept
                slept_at = now
                continue
            slept_at = now
            for replica in self.replicas:
                if replica.asked_at and now - replica.asked_at > settings.patience:
                    replica.lost(ModelError(f"no answer for {now - replica.asked_at:.1f} s", Outcome.STALLED))
                for attempt in tuple(replica.attempts):
                    if error := attempt.overdue(settings.first_token_timeout, settings.stall_timeout, now):
                        attempt.generation.abandon(error)


def _candidate(replica: Replica, now: float) -> Candidate:
    status = replica.status if now - replica.heard_at < FRESH else None
    return Candidate(
        name=replica.address,
        in_flight=len(replica.attempts) + (replica.others if status else 0),
        load=None if status is None else max(status.waiting, status.kv_usage),
    )
