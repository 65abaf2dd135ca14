"""Who answers a request: the decoder, or the fallback where the decoder can't.

A thread for each attempt reads a model's responses and hands them on. The monitor looks at all requests: who hung up,
and who waits too long. An attempt that lost its turn is cancelled by its id and read to its end all the same, or Triton
could not unload the model; nothing that it still says reaches the caller.
"""

from __future__ import annotations

import itertools
import logging
import queue
import random
import threading
import time

import msgspec

from tidewright.bridge.sampling_parameters import with_max_tokens
from tidewright.config import Settings
from tidewright.errors import seconds_text
from tidewright.failsafe.limits import TimeLimits, overdue
from tidewright.failsafe.metrics import BREAKER_OPEN, DEGRADED, Counters, samples
from tidewright.failsafe.models import Control, Order, Request
from tidewright.failsafe.pulse import STOP_PATIENCE, Pulse
from tidewright.failsafe.relay import Attempt, Relay
from tidewright.metrics import Samples
from tidewright.resilience.breaker import CircuitBreaker, Refusal
from tidewright.resilience.budget import RetryBudget
from tidewright.resilience.deadline import Deadline
from tidewright.resilience.degradation import Degradation, Ladder, Level, Load, Route, treatment
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.resilience.retry import NoRetry
from tidewright.resilience.succession import FINAL, LOST, failed_at_fallback, fallback_may_answer
from tidewright.schema import CANCEL, FinishReason, SamplingParams

log = logging.getLogger(__name__)

MONITOR_INTERVAL = 0.01  # seconds
MONITOR_SHARE = 0.05  # of one core, at most: asking Triton who hung up is a round trip to its process
FRESH = 1.0  # seconds that what an engine said last tells how busy it is
LATE = 0.5  # seconds after its own timeout in which a model should have ended a request
SWEEPERS = 4
CANCEL_TRIES, CANCEL_PAUSE = 20, 0.05  # seconds

# Asking again may help: nothing was computed for the request, or what was is lost.
_RETRIABLE = LOST | {Outcome.FIRST_TOKEN_TIMEOUT}
_CALM = Degradation(Level.ALL_FEATURES, Level.ALL_FEATURES, ())


class Failsafe:
    def __init__(self, settings: Settings, control: Control) -> None:
        now = time.monotonic()
        self._settings, self._control = settings, control
        self._limits = TimeLimits(
            settings.failsafe_patience, settings.failsafe_first_token_timeout, settings.failsafe_stall_timeout
        )
        self._pulse = Pulse(control, silence=settings.failsafe_patience, has_fallback=bool(settings.fallback))
        self._breaker = CircuitBreaker(settings.breaker_config())
        self._retries, self._budget = settings.retry_policy(), RetryBudget(settings.budget_config(), now)
        self._ladder = Ladder(settings.ladder_config())
        self._degradation = _CALM
        self._counters = Counters()
        self._serials = itertools.count(1)
        self._relays: dict[Relay, None] = {}
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._limit = 2 * (settings.max_running + settings.max_waiting)  # what decoder and fallback take
        self._to_cancel: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._monitor, name="monitor", daemon=True),
            *(threading.Thread(target=self._sweep, name="sweeper", daemon=True) for _ in range(SWEEPERS)),
        ]

    def start(self) -> None:
        self._pulse.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the threads, but for those that wait for a model that hangs; Triton calls it when no request is left."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        for _ in range(SWEEPERS):
            self._to_cancel.put(None)
        self._pulse.stop()
        until = time.monotonic() + STOP_PATIENCE
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))

    def submit(self, request: Request, sampling: SamplingParams, client_id: str, *, streams: bool) -> None:
        """Returns at once; the answer goes to `request`."""
        now = time.monotonic()
        self._budget.deposit()
        if len(self._relays) >= self._limit:
            self._counters.count("requests_failed_total", "overloaded")
            request.fail(f"{self._limit} requests are in flight already; try again later", "overloaded")
            return
        deadline = Deadline.after(sampling.timeout, now)
        relay = Relay(request, client_id, next(self._serials), sampling, streams, deadline)
        with relay.lock:  # whoever finds it among the relays waits until it has begun
            with self._changed:
                self._relays[relay] = None
                self._changed.notify_all()
            attempt = self._first(relay, now)
        if attempt:
            self._start(relay, attempt)

    def refused(self, reason: FinishReason) -> None:
        """Counts a request that was not fit to be submitted."""
        self._counters.count("requests_failed_total", reason)

    def cancel(self, client_id: str) -> int:
        """Ends the requests of that id; how many there are."""
        with self._changed:
            found = [relay for relay in self._relays if relay.client_id == client_id]
        for relay in found:
            self._end(relay, "cancelled by its id", Outcome.CANCELLED)
        return len(found)

    @property
    def trouble(self) -> str:
        """Why nobody can answer; empty if someone can."""
        trouble = self._pulse.trouble
        return "" if trouble is None or self._pulse.fallback_ready else f"decoder: {trouble.cause}"

    def samples(self) -> Samples:
        now = time.monotonic()
        breaker, retry_budget = self._breaker.snapshot(now), self._budget.balance(now)
        return samples(self._counters, len(self._relays), breaker, retry_budget, self._degradation.level)

    # One request.

    def _first(self, relay: Relay, now: float) -> Attempt | None:
        """With the relay's lock held: the first attempt; None if it was refused."""
        if self._settings.degradation:
            way = treatment(self._degradation, relay.sampling.max_tokens, self._settings.degrade_max_tokens)
            if way.route is Route.REFUSE:
                self._fail(relay, "the server is overloaded and takes no requests now; try again later", "overloaded")
                return None
            relay.sampling = with_max_tokens(relay.sampling, way.max_tokens)
            if way.route is Route.FALLBACK and self._can_fall_back(relay):
                return self._begin_fallback(relay, DEGRADED, now)
        trouble = self._pulse.trouble
        if trouble and self._can_fall_back(relay) and now - trouble.since > self._limits.patience:
            return self._begin_fallback(relay, trouble.kind.outcome.label, now)
        permit = self._breaker.acquire(now)
        if isinstance(permit, Refusal):
            if self._can_fall_back(relay):
                return self._begin_fallback(relay, BREAKER_OPEN, now)
            message = f"the model failed too often to be asked now; try again in {permit.retry_after:.1f} s"
            self._fail(relay, message, "engine_failed")
            return None
        return relay.begin("decoder", now, permit=permit)

    def _start(self, relay: Relay, attempt: Attempt) -> None:
        """A daemon: one that reads from a dead stub never ends, and must not keep this process."""
        try:
            threading.Thread(target=self._run, args=(relay, attempt), name="attempt", daemon=True).start()
        except RuntimeError:  # the system gives no more
            log.exception("there is no thread for an attempt")
            attempt.over = True
            self._end(
                relay, "the server has no thread for one more request; try again later", Outcome.OVERLOADED, attempt
            )

    def _run(self, relay: Relay, attempt: Attempt | None) -> None:
        """One attempt after the other, until one succeeds, none is left, or the monitor gave the turn to another."""
        while attempt:
            try:
                attempt = self._make(relay, attempt)
            except Exception:
                log.exception("a request went wrong")
                self._end(relay, "internal error; see the server's log", Outcome.ENGINE_FAILED, attempt)
                return

    def _make(self, relay: Relay, attempt: Attempt) -> Attempt | None:
        """Make an attempt; the one that follows, if any."""
        wait = attempt.began - time.monotonic()
        if wait > 0:
            self._stopping.wait(wait)
        if attempt.model == "decoder":
            self._wait_for_decoder(relay, attempt)
        if relay.current is not attempt:
            return None
        try:
            self._read(relay, attempt)
            error = ModelError("the model ended the request without a last response")
        except ModelError as caught:
            error = caught
        attempt.over = True
        with relay.lock:
            if relay.ended or relay.current is not attempt:
                return None
            return self._next(relay, attempt, error, time.monotonic())

    def _wait_for_decoder(self, relay: Relay, attempt: Attempt) -> None:
        """While another process is on its way, if nobody else can answer."""
        until = attempt.began + self._settings.start_timeout
        while self._pulse.decoder_is_gone and relay.current is attempt and not self._stopping.is_set():
            if self._can_fall_back(relay) or time.monotonic() > until:
                break
            self._stopping.wait(MONITOR_INTERVAL)

    def _read(self, relay: Relay, attempt: Attempt) -> None:
        sampling, now = relay.sampling, time.monotonic()
        if sampling.timeout is not None:
            sampling = msgspec.structs.replace(sampling, timeout=relay.deadline.remaining(now))
        if relay.delivered:
            self._counters.count("resumed_total")
        self._counters.count("calls_total", attempt.model)
        order = Order(attempt.request_id, sampling, list(relay.delivered))
        for reply in relay.request.generate(attempt.model, order):
            now = time.monotonic()
            if not relay.take(attempt, reply, now):
                continue
            permit = attempt.permit
            if permit and (reply.final or (permit.is_probe and reply.token_ids)):
                with relay.lock:  # else the monitor, or a cancel, could record it at the same time
                    self._record(attempt, Outcome.SUCCESS, now)  # of a probe: until then, nobody else gets through
            if reply.final:  # the end of the stream may come late, or never from a stub that dies
                self._counters.count("requests_served_total", attempt.model)
                self._forget(relay)

    def _next(self, relay: Relay, failed: Attempt, error: ModelError, now: float) -> Attempt | None:
        """With the relay's lock held: what follows a failed attempt; None if the request ended with it."""
        self._record(failed, error.outcome, now)
        relay.current = None
        if failed.model == "fallback":
            error = failed_at_fallback(error)
        message, reason = str(error), error.reason
        if error.outcome in FINAL:
            self._fail(relay, message, reason)
            return None
        if relay.deadline.expired(now):
            self._fail(relay, f"timed out after {seconds_text(relay.sampling.timeout)} s: {message}", "timeout")
            return None
        is_foreign = failed.model == "fallback" and not relay.request.continues  # of what is delivered
        if relay.delivered and (is_foreign or not relay.can_go_on or self._settings.failsafe_resume == "fail"):
            self._fail(relay, f"{message}, after {len(relay.delivered)} tokens", "engine_failed")
            return None
        if failed.model == "decoder" and self._can_fall_back(relay):
            return self._begin_fallback(relay, error.outcome.label, now)
        if failed.model == "fallback":
            message = f"neither the decoder ({failed.reason}) nor the fallback can answer: {message}"
        if error.outcome in _RETRIABLE and (attempt := self._retry(relay, error.outcome, now)):
            return attempt
        self._fail(relay, message, reason)
        return None

    def _retry(self, relay: Relay, outcome: Outcome, now: float) -> Attempt | None:
        """The decoder once more, after a while."""
        if outcome is Outcome.STUB_DIED and relay.tries < self._settings.retry_max_attempts:
            # It lost all that it had at once: all of it is taken up again, as after the death of an engine.
            self._counters.count("retries_total")
            return relay.begin("decoder", now)
        delay = self._retries.next_delay(max(relay.tries, 1), now, relay.deadline, random.random(), self._budget)
        if isinstance(delay, NoRetry):
            self._counters.count("retries_refused_total", delay.value)
            return None
        permit = self._breaker.acquire(now)
        if isinstance(permit, Refusal):
            return None
        self._counters.count("retries_total")
        return relay.begin("decoder", now + delay, permit=permit)

    def _can_fall_back(self, relay: Relay) -> bool:
        fits = relay.request.fits_fallback and fallback_may_answer(relay.sampling)
        return fits and (relay.request.continues or not relay.delivered) and self._pulse.fallback_ready

    def _begin_fallback(self, relay: Relay, reason: str, now: float) -> Attempt:
        self._counters.count("fallbacks_total", reason)
        return relay.begin("fallback", now, reason)

    def _record(self, attempt: Attempt, outcome: Outcome, now: float) -> None:
        """With the relay's lock held: what the breaker is to know of it; the first call counts."""
        permit, attempt.permit = attempt.permit, None
        if permit:
            self._counters.count("outcomes_total", outcome.label)
            self._breaker.record(permit, outcome, now)

    def _fail(self, relay: Relay, message: str, reason: FinishReason) -> None:
        """With the relay's lock held."""
        self._counters.count("requests_failed_total", reason)
        self._forget(relay)
        try:
            relay.fail(message, reason)
        except Exception:
            log.exception("an error could not be sent")

    def _end(self, relay: Relay, message: str, outcome: Outcome, of: Attempt | None = None) -> None:
        """From outside, whatever it is at; or `of` an attempt, if no other has the turn by now."""
        with relay.lock:
            attempt = relay.current
            if relay.ended or (of and attempt and attempt is not of):
                return
            relay.current = None
            if attempt:
                now = time.monotonic()
                self._record(attempt, outcome, now)
                if now >= attempt.began:  # else it still waits for its turn, and won't be made
                    self._to_cancel.put(attempt)
            self._fail(relay, message, ModelError("", outcome).reason)

    def _forget(self, relay: Relay) -> None:
        with self._changed:
            self._relays.pop(relay, None)

    # All requests.

    def _monitor(self) -> None:
        while not self._stopping.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._relays or self._stopping.is_set(), MONITOR_INTERVAL * 50)
                relays = list(self._relays)
            began = time.monotonic()
            try:
                self._pulse.watch(began, is_awaited=bool(relays))
                self._watch_load(began)
            except Exception:
                log.exception("the models could not be watched")
            for relay in relays:
                try:
                    self._watch(relay)
                except Exception:
                    log.exception("a request could not be watched")
            took = time.monotonic() - began
            self._stopping.wait(max(MONITOR_INTERVAL, took / MONITOR_SHARE))

    def _watch_load(self, now: float) -> None:
        status, is_open = self._pulse.status, self._breaker.state.value == "open"
        # A decoder that says nothing has no queue: what it said last must not hold a level.
        load = Load(status.kv_usage, status.waiting, status.wait, is_open) if status else Load(0.0, 0.0, 0.0, is_open)
        self._degradation = self._ladder.update(load, now)

    def _watch(self, relay: Relay) -> None:
        now = time.monotonic()
        if relay.is_cancelled:
            self._end(relay, "cancelled by the client", Outcome.CANCELLED)
            return
        if now > relay.deadline.at + LATE:
            self._end(relay, f"timed out after {seconds_text(relay.sampling.timeout)} s", Outcome.REQUEST_TIMEOUT)
            return
        with relay.lock:
            attempt = relay.current
            if relay.ended or attempt is None or now < attempt.began:
                return
            error = self._why_not_wait(relay, attempt, now)
            if error is None:
                return
            following = self._next(relay, attempt, error, now)
        if error.outcome is not Outcome.STUB_DIED:
            self._to_cancel.put(attempt)
        if following:
            self._start(relay, following)

    def _why_not_wait(self, relay: Relay, attempt: Attempt, now: float) -> ModelError | None:
        """For an attempt any longer; None: wait."""
        if attempt.began < self._pulse.stubs[attempt.model].lost_before:
            return ModelError(f"the {attempt.model}'s process died", Outcome.STUB_DIED)
        if attempt.model == "fallback":  # where else to go?
            return None
        trouble, has_fallback = self._pulse.trouble, self._can_fall_back(relay)
        outcome = overdue(relay.progress(attempt), trouble, self._limits, now, has_fallback=has_fallback)
        if outcome is None:
            return None
        if outcome is Outcome.FIRST_TOKEN_TIMEOUT and self._is_busy:
            outcome = Outcome.OVERLOADED  # it is not the model that fails
        cause = trouble.cause if trouble else f"no token for {now - (attempt.last_token or attempt.began):.1f} s"
        return ModelError(cause, outcome)

    @property
    def _is_busy(self) -> bool:
        status = self._pulse.status
        return status is not None and status.waiting > 0 and status.silence < FRESH

    def _sweep(self) -> None:
        """Cancels attempts that lost their turn: a call that may take a second."""
        while attempt := self._to_cancel.get():
            for _ in range(CANCEL_TRIES):
                try:
                    self._control(attempt.model, CANCEL + attempt.request_id)
                    break
                except ModelError as error:
                    if attempt.over or error.outcome is Outcome.STUB_DIED:
                        break
                except Exception:
                    log.exception("an attempt could not be cancelled")
                self._stopping.wait(CANCEL_PAUSE)  # it is on its way there
