"""Feels the pulse of decoder and fallback: can they work, and how much load is there?"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from enum import Enum

import msgspec

from tidewright.failsafe.models import Control
from tidewright.failsafe.stub_process import StubProcess
from tidewright.logs import event
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import DecoderStatus

log = logging.getLogger(__name__)

# Seconds between two questions, each of which costs 1 ms of a core. Without a fallback nobody has to be quick.
INTERVAL, INTERVAL_ALONE = 0.1, 1.0
IDLE_INTERVAL = 1.0  # while nobody waits for an answer, and all is well
UNANSWERED = 2.0  # seconds; for a stub that is dead Triton answers after one
FALLBACK_EVERY = 5  # questions to the decoder for one to the fallback
STOP_PATIENCE = 2.0  # seconds; a model that is there answers within one


class Kind(Enum):
    """What is wrong, and the outcome that it means for a request there."""

    RESTARTING = ("restarting", Outcome.UNAVAILABLE)  # the bridge has all requests, and the next engine gets them
    SILENT = ("silent", Outcome.STALLED)  # the engine gives no sign of life, or the stub none
    STUB_DIED = ("stub died", Outcome.STUB_DIED)  # what was in it is lost, and its streams hang for ever
    UNLOADED = ("unloaded", Outcome.UNAVAILABLE)  # takes nothing new; what runs there goes on

    def __init__(self, label: str, outcome: Outcome) -> None:
        self.label = label
        self.outcome = outcome


@dataclass(frozen=True)
class Trouble:
    kind: Kind
    since: float
    cause: str


class _TooLateError(Exception):
    """Another thread asks by now."""


class Pulse:
    """One thread asks; any may read."""

    def __init__(self, control: Control, *, silence: float, has_fallback: bool) -> None:
        """`silence`: seconds without a sign of life that mean trouble."""
        self._control, self._silence, self._has_fallback = control, silence, has_fallback
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._asked_at: float | None = None  # time.monotonic(), while a question waits for its answer
        self._is_awaited = True
        self._ask_now = threading.Event()
        self.stubs = {"decoder": StubProcess(), "fallback": StubProcess()}
        self.decoder_is_gone = False
        """Its process has died, and another is not there yet; nobody unloaded it, but to load it again."""
        self.trouble: Trouble | None = None
        """Of the decoder."""
        self.status: DecoderStatus | None = None
        """What the decoder said last; None if it said nothing, or an error."""
        self.fallback_ready = False

    def start(self) -> None:
        """Raises RuntimeError: the system gives no thread; all stays as it is."""
        before = self._thread, self._asked_at
        self._thread, self._asked_at = threading.Thread(target=self._loop, name="pulse", daemon=True), None
        try:
            self._thread.start()
        except RuntimeError:
            self._thread, self._asked_at = before
            raise

    def stop(self) -> None:
        """Does not wait for ever: a stub that dies leaves a question open."""
        self._stopping.set()
        self._ask_now.set()
        if self._thread:
            self._thread.join(STOP_PATIENCE)
        for stub in self.stubs.values():
            stub.close()

    def watch(self, now: float, *, is_awaited: bool) -> None:
        """To be called now and then, and at once when somebody begins to wait for an answer (`is_awaited`)."""
        if is_awaited and not self._is_awaited:
            self._ask_now.set()
        self._is_awaited = is_awaited
        ended = [model for model, stub in self.stubs.items() if stub.look(now)]
        if "decoder" in ended and self.stubs["decoder"].died:
            self.decoder_is_gone = True
        # A question that was in a stub when it died is never answered.
        if self._asked_at is not None and (ended or now - self._asked_at > UNANSWERED):
            self.start()
        elif ended:
            self._ask_now.set()

    def _loop(self) -> None:
        rounds, interval = 0, INTERVAL if self._has_fallback else INTERVAL_ALONE
        while self._thread is threading.current_thread() and not self._stopping.is_set():
            try:
                if self._has_fallback and rounds % FALLBACK_EVERY == 0:
                    self._ask_fallback()
                rounds += 1
                self._ask_decoder()
            except _TooLateError:
                return
            except Exception:  # without this thread, nobody would know how the models are
                log.exception("a model could not be asked how it is")
            self._ask_now.wait(interval if self._is_awaited or self.trouble else IDLE_INTERVAL)
            self._ask_now.clear()

    def _ask(self, model: str, word: str) -> str:
        self._asked_at = time.monotonic()
        try:
            return self._control(model, word)
        finally:
            if self._thread is not threading.current_thread():
                raise _TooLateError
            self._asked_at = None

    def _ask_decoder(self) -> None:
        try:
            self.status = self._ask_status("decoder")
            self.decoder_is_gone = False
            found = self._of_status(self.status)
        except ModelError as error:
            self.status = None
            now = time.monotonic()  # it may have died, or been unloaded, long after the question
            if error.outcome is Outcome.STUB_DIED or self.decoder_is_gone:
                if not self.decoder_is_gone:  # nobody saw it end
                    self.stubs["decoder"].lost_before, self.decoder_is_gone = now, True
                # In its own words: Triton's, handed on by our health, would say that this model's stub had died.
                since = self.stubs["decoder"].lost_before
                found = Trouble(Kind.STUB_DIED, since, "its process died")
            else:
                found = Trouble(Kind.UNLOADED, now, str(error))
        before = self.trouble
        if found and before and found.kind is before.kind:
            found = Trouble(found.kind, min(found.since, before.since), found.cause)
        elif found:
            log.warning("decoder: %s (%s)", found.kind.label, found.cause, extra=event("decoder_trouble"))
        elif before:
            log.info("decoder: well again", extra=event("decoder_recovered"))
        self.trouble = found

    def _of_status(self, status: DecoderStatus) -> Trouble | None:
        now = time.monotonic()
        if status.silence > self._silence:  # which is trouble too, after a while
            return Trouble(Kind.SILENT, now - status.silence, f"no sign of life for {status.silence:.1f} s")
        if status.trouble and not status.draining:
            return Trouble(Kind.RESTARTING, now, status.trouble)
        return None

    def _ask_fallback(self) -> None:
        try:
            self.fallback_ready = not self._ask_status("fallback").trouble
        except ModelError as error:
            self.fallback_ready = False
            if error.outcome is Outcome.STUB_DIED:
                self.stubs["fallback"].lost_before = time.monotonic()

    def _ask_status(self, model: str) -> DecoderStatus:
        status = msgspec.json.decode(self._ask(model, "status"), type=DecoderStatus)
        if status.pid:
            self.stubs[model].named(status.pid, time.monotonic())
        return status
