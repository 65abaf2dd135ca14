"""Health checks of replicas: frequent status requests, and now and then a generated token."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from tidewright.logs import event
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome, Verdict
from tidewright.schema import OLDEST_PROTOCOL, PROTOCOL, DecoderStatus, SamplingParams, StatusVersion
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.replicas.replica import Replica
from tidewright_gateway.replicas.triton import CallRequest

log = logging.getLogger(__name__)

STATUS_TIMEOUT = 2.0  # seconds; longer than Triton takes to say that a stub is dead
NOT_LOADED = (
    "its model %s is not loaded; `tidewright health` at that Triton's HTTP port says why, and how to load it again"
)
JITTER = 0.25  # of the interval between two generation probes, so that several gateways do not probe in step
# It runs before everything queued: the probe is not about the queue.
_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, priority=-(2**31))
_EMBEDDING = SamplingParams(priority=-(2**31))
_PROMPT = [0]  # a token id that every vocabulary has


@dataclass(frozen=True)
class Expected:
    """The model that this gateway expects."""

    model: str
    """The name of the model's folder."""
    tokenizer: str
    """Fingerprint of its tokenizer."""

    def misfit(self, status: DecoderStatus) -> str:
        """Why a replica's model does not match; empty if it does, or does not identify itself."""
        if status.model and status.model != self.model:
            return f"serves {status.model}, not {self.model}"
        if status.tokenizer and status.tokenizer != self.tokenizer:
            return f"serves {self.model} with another tokenizer than this gateway has"
        return ""


def read_status(answer: str) -> DecoderStatus:
    """A replica's answer to the word "status".

    Raises:
        ModelError: it is of a version of Tidewright that this gateway does not work with.
        MsgspecError: it is no status.
    """
    version = msgspec.json.decode(answer, type=StatusVersion).protocol
    if not OLDEST_PROTOCOL <= version <= PROTOCOL:
        older, change = ("replica", "replica") if version < OLDEST_PROTOCOL else ("gateway", "gateway first")
        raise ModelError(
            f"speaks protocol {version}, this gateway {OLDEST_PROTOCOL} to {PROTOCOL}: the {older} is too old; "
            f"upgrade the {change}",
            Outcome.UNAVAILABLE,
        )
    return msgspec.json.decode(answer, type=DecoderStatus)


async def ask_status(replica: Replica, patience: float, expected: Expected) -> None:
    """One status check, recorded in the replica. `patience`: maximum silence of its engine, in seconds."""
    began = replica.asked_at = time.monotonic()
    replica.unanswered = 0.0
    replica.in_flight_when_asked = len(replica.attempts)
    try:
        answer = await replica.client.control("status", STATUS_TIMEOUT, replica.decoder)
        status = read_status(answer)
        now = time.monotonic()
        replica.status_took = now - began
        replica.heard(status, patience, now, expected.misfit(status))
    except msgspec.MsgspecError as error:
        replica.lost(ModelError(f"is it a Tidewright server? {error}", Outcome.UNAVAILABLE))
    except ModelError as error:
        replica.lost(
            ModelError(NOT_LOADED % replica.decoder, error.outcome) if "unknown model" in str(error) else error
        )
    finally:
        replica.asked_at = None


async def ask_fallback(replica: Replica, expected: Expected) -> None:
    """One status check of the replica's fallback. One with another tokenizer can't be used: prompts are token ids."""
    found: DecoderStatus | None = None
    with suppress(ModelError, msgspec.MsgspecError):
        answer = await replica.client.control("status", STATUS_TIMEOUT, "fallback")
        status = read_status(answer)
        if not (status.trouble or replica.misfit) and status.tokenizer in ("", expected.tokenizer):
            found = status
    replica.fallback = found


class GenerationProbes:
    """Makes each replica in turn generate a token, once per `generation_probe_interval`.

    So those are found that say that they are well, and generate nothing. A request that got tokens there lately shows
    the same, and saves the probe. That a replica is overloaded says nothing against it.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        metrics: Metrics,
        replicas: Sequence[Replica],
        probed: Callable[[Replica], None],
    ) -> None:
        """`replicas` may change. `probed` is called after each probe that may have changed its replica's state."""
        self._settings, self._metrics, self._replicas, self._probed = settings, metrics, replicas, probed
        self._numbers = itertools.count(1)
        self._running: dict[Replica, asyncio.Task[None]] = {}

    async def run_for_ever(self) -> None:
        interval = self._settings.generation_probe_interval
        try:
            while interval:
                pause = interval / max(len(self._replicas), 1)
                await asyncio.sleep(pause * random.uniform(1 - JITTER, 1 + JITTER))
                try:
                    if replica := self._next(time.monotonic()):
                        # In a task of its own: one that hangs must not delay the others.
                        self._running[replica] = asyncio.create_task(self._probe_and_forget(replica))
                except Exception:
                    log.exception("no generation probe could be made")
        finally:
            for task in tuple(self._running.values()):
                task.cancel()

    def _next(self, now: float) -> Replica | None:
        """The next replica to probe; None if it needs no probe."""
        up = [replica for replica in self._replicas if replica.is_up and replica not in self._running]
        if not up:
            return None
        replica = min(up, key=lambda replica: replica.probed_at)
        replica.probed_at = now
        return None if now - replica.generated_at < self._settings.generation_probe_interval else replica

    async def _probe_and_forget(self, replica: Replica) -> None:
        try:
            await self.probe(replica)
        except Exception:
            log.exception("%s: the generation probe went wrong", replica.label)
        finally:
            del self._running[replica]

    async def probe(self, replica: Replica) -> None:
        """One probe; ejects the replica after too many consecutive failures."""
        began = time.monotonic()
        error = await self._generate(replica)
        now = time.monotonic()
        self._metrics.generation_probed(replica.label, error.outcome if error else Outcome.SUCCESS)
        if error is None:
            replica.probe_took = now - began
            replica.can_generate()
        elif error.outcome.verdict is not Verdict.FAILURE:
            return
        # Not if its status changed meanwhile, or if a request got tokens, which proves that it generates.
        elif replica.is_up and replica.generated_at < began:
            replica.failed_probes += 1
            extra = event("attempt_failed", replica=replica.label)
            log.warning("%s: generation probe failed: %s", replica.label, error, extra=extra)
            if replica.failed_probes >= self._settings.generation_probe_failures:
                replica.ejected = ModelError(f"reports healthy, but generates nothing ({error})", error.outcome)
        self._probed(replica)

    async def _generate(self, replica: Replica) -> ModelError | None:
        """The error of a probe; None if it got a token, or an embedding."""
        sampling = msgspec.json.encode(_EMBEDDING if replica.embeds else _ONE_TOKEN)
        request = CallRequest(f"probe-{next(self._numbers)}", _PROMPT, sampling, embeds=replica.embeds)
        call = replica.client.generate(replica.decoder, request)
        limit = self._settings.generation_probe_timeout
        too_late = ModelError(f"no token within {limit:g} s", Outcome.FIRST_TOKEN_TIMEOUT)
        timer = asyncio.get_running_loop().call_later(limit, call.abandon, too_late)
        try:
            while not ((reply := await call.read()).token_ids or reply.embedding):
                if reply.finish_reason:
                    return ModelError("the stream ended without a token", Outcome.ENGINE_FAILED)
            return None
        except ModelError as error:
            return error
        finally:
            timer.cancel()
            call.close()
