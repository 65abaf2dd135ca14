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
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tidewright.resilience.breaker import Permit, State
from tidewright.resilience.budget import RetryBudget
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.resilience.retry import NoRetry
from tidewright.schema import SamplingParams
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.replicas.replica import Attempt, Replica
from tidewright_gateway.replicas.replica_set import WATCH_INTERVAL, ReplicaLoad, ReplicaSet
from tidewright_gateway.replicas.triton import CallRequest, Reply

log = logging.getLogger(__name__)

# The request's own doing, or the same everywhere: nobody else is asked.
_FINAL = (Outcome.INVALID, Outcome.CANCELLED, Outcome.REQUEST_TIMEOUT)
# The replica is gone or says nothing: it computes no longer, so whoever goes on elsewhere adds no load.
_MOVES = (Outcome.UNAVAILABLE, Outcome.STALLED, Outcome.STUB_DIED)


@dataclass
class Generation:
    """One generation, until it ends."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    deadline: Deadline
    logprobs: bool = False
    metadata: tuple[tuple[str, str], ...] = ()
    """Of its calls to the replicas."""
    delivered: list[int] = field(default_factory=list)
    """Tokens that were handed on."""
    served_by: list[str] = field(default_factory=list)
    """Addresses of the replicas that were asked, in order."""
    model: str = "decoder"
    """The model of Triton that was asked last: decoder or fallback."""


class Failover:
    def __init__(self, settings: GatewaySettings, metrics: Metrics, max_model_len: int) -> None:
        """`max_model_len`: the model's own, in tokens."""
        self._settings, self._metrics = settings, metrics
        self._max_model_len = max_model_len
        self._fleet = ReplicaSet(settings, metrics)
        self._retries = settings.retry_policy()
        self._budget = RetryBudget(settings.budget_config(), time.monotonic())

    async def start(self) -> None:
        """Asks each replica once, and goes on asking. In the event loop: gRPC ties its channels to it."""
        await self._fleet.start()

    async def stop(self) -> None:
        await self._fleet.stop()

    @property
    def replicas(self) -> list[Replica]:
        return self._fleet.replicas

    @property
    def trouble(self) -> str:
        """Why no replica can be sent anything; empty if one can."""
        return self._fleet.trouble

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together that every replica takes."""
        return self._fleet.max_model_len(self._max_model_len)

    def snapshot(self) -> list[dict[str, Any]]:
        """Each replica for people; times in seconds."""
        return self._fleet.snapshot()

    def load(self) -> ReplicaLoad:
        """How much room there is."""
        return self._fleet.load()

    async def generate(self, task: Generation) -> AsyncGenerator[Reply, None]:
        """To the last reply, which alone has a finish_reason.

        Raises:
            ModelError: it can't be ended; what was handed on stands.
        """
        self._budget.deposit()
        task.model = "decoder"
        failures = 0  # since a token came
        last: ModelError | None = None
        while True:
            replica, attempt, permit = await self._begin(task, last)
            before = len(task.delivered)
            try:
                async with aclosing(attempt.generation.replies()) as replies:
                    async for reply in replies:
                        now, is_first = time.monotonic(), attempt.last_token is None
                        attempt.last_token = now
                        replica.unanswered = 0.0  # it lives, even if it has too much to do to say so
                        task.delivered += reply.token_ids
                        if is_first and reply.token_ids:
                            self._fleet.generated(replica, now)
                        # At the first token: until a probe reports, nobody else gets through.
                        if not permit.reported and (permit.is_probe or reply.finish_reason):
                            replica.breaker.record(permit, Outcome.SUCCESS, now)
                            if permit.is_probe and replica.breaker.state is State.CLOSED:
                                replica.came_at = now
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
            self._fleet.failed(replica, last)
            failures = 1 if len(task.delivered) > before else failures + 1
            self._failed(task, replica, last)
            if not await self._may_retry(last, failures, task.deadline):
                raise timed_out(last) if task.deadline.expired(time.monotonic()) else last
            if task.delivered:
                self._metrics.moved()

    async def _may_retry(self, error: ModelError, failures: int, deadline: Deadline) -> bool:
        """True when it is time for the next attempt."""
        if error.outcome is Outcome.ENGINE_KILLED:
            return False
        now = time.monotonic()
        if error.outcome in _MOVES and failures < self._retries.max_attempts:
            return not deadline.expired(now)
        delay = self._retries.next_delay(failures, now, deadline, random.random(), self._budget)
        if isinstance(delay, NoRetry):
            self._metrics.retry_refused(delay.value)
            return False
        await asyncio.sleep(delay)
        return True

    async def _begin(self, task: Generation, last: ModelError | None) -> tuple[Replica, Attempt, Permit]:
        """An attempt at a replica that can take it; waits for one if there is none.

        Raises:
            ModelError: there was none in time.
        """
        now = time.monotonic()
        until = min(now + self._settings.wait_for_replica, task.deadline.at)
        while not (chosen := self._fleet.choose(task.prompt, task.served_by[-1] if task.served_by else "", now)):
            if now >= until:
                none = ModelError(f"no replica can take requests ({self.trouble})", Outcome.UNAVAILABLE)
                raise timed_out(last or none) if task.deadline.expired(now) else (last or none)
            await self._fleet.wait_for_change(min(until - now, WATCH_INTERVAL))
            now = time.monotonic()
        replica, permit = chosen
        attempt = self._ask(task, replica, list(task.delivered), now)
        replica.attempts.add(attempt)
        return replica, attempt, permit

    async def fall_back(self, task: Generation) -> AsyncGenerator[Reply, None]:
        """The same from the replicas' fallback model, for a task of which nothing was handed on yet.

        It has no breaker, and no stream goes on elsewhere; one that has not begun is tried at another replica, once.

        Raises:
            ModelError: it can't be ended; what was handed on stands.
        """
        task.model = "fallback"
        asked: list[str] = []
        last = ModelError(f"no replica is there ({self.trouble})", Outcome.UNAVAILABLE)
        while len(asked) < 2 and not task.delivered and (replica := self._fleet.choose_fallback(asked)):
            now = time.monotonic()
            if task.deadline.expired(now):
                raise timed_out(last)
            asked.append(replica.address)
            attempt = self._ask(task, replica, [], now)
            replica.fallbacks.add(attempt)
            try:
                async with aclosing(attempt.generation.replies()) as replies:
                    async for reply in replies:
                        attempt.last_token = time.monotonic()
                        task.delivered += reply.token_ids
                        yield reply
                        if reply.finish_reason:
                            return
                last = ModelError("the replica ended the stream without a last reply", Outcome.ENGINE_FAILED)
            except ModelError as error:
                last = error
            finally:
                replica.fallbacks.discard(attempt)
            self._failed(task, replica, last)
            if last.outcome is Outcome.INVALID:  # the decoder would have taken it
                raise ModelError(f"the fallback can't answer this: {last}", Outcome.ENGINE_FAILED)
            if last.outcome in _FINAL:
                break
        raise last

    def _ask(self, task: Generation, replica: Replica, resume_ids: list[int], now: float) -> Attempt:
        sampling = task.sampling
        if math.isfinite(task.deadline.at):
            sampling = msgspec.structs.replace(sampling, timeout=task.deadline.remaining(now))
        order = CallRequest(
            task.request_id, task.prompt, msgspec.json.encode(sampling), resume_ids, task.logprobs, task.metadata
        )
        task.served_by.append(replica.address)
        self._metrics.attempt(replica.address, task.model)
        return Attempt(replica.client.generate(task.model, order), now)

    def _failed(self, task: Generation, replica: Replica, error: ModelError) -> None:
        self._metrics.attempt_failed(replica.address, task.model, error.outcome)
        log.warning("%s: %s of %s failed: %s", task.request_id, task.model, replica.address, error)


def timed_out(error: ModelError) -> ModelError:
    """What a caller whose time is over is told: that, and what it was waiting for."""
    return ModelError(f"the request's time is over: {error}", Outcome.REQUEST_TIMEOUT)
