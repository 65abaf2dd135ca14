"""A failsafe between two scripted models and recording callers, with a clock that can be put forward."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import msgspec

from tidewright.config import Settings
from tidewright.failsafe import failsafe, pulse
from tidewright.failsafe.failsafe import Failsafe
from tidewright.failsafe.models import ModelReply, Order
from tidewright.resilience.breaker import CircuitBreaker, Permit, Refusal
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import CANCEL, DecoderStatus, FinishReason, SamplingParams

PATIENCE = 20.0  # seconds
WELL = DecoderStatus(trouble="", draining=False, silence=0.0, waiting=0.0, wait=0.0, kv_usage=0.0)
SILENT = msgspec.structs.replace(WELL, silence=1000.0)
STUB_DIED = "Stub process 'decoder_0_0' is not healthy."
RESTARTING = msgspec.structs.replace(WELL, trouble="the engine is starting")
UNLOADED = "Request for unknown model: 'decoder' is not found"


@dataclass(frozen=True)
class Last:
    """A last response, and its tokens."""

    token_ids: list[int] = field(default_factory=list)


FIRST_TOKEN_TIMEOUT, STALL_TIMEOUT = 30.0, 10.0  # seconds; of the settings
HANG = "hang"  # until it is cancelled

# Tokens, a last response, HANG, any other text as an error, or something to do: one after the other.
Act = list[int] | Last | str | Callable[[], object]


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Gate:
    """An act that ends when the test opens it, cancelled or not."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self._opened.wait(PATIENCE)

    def open(self) -> None:
        self._opened.set()


class Clock:
    """In the place of the module `time`."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self._stopped_at: float | None = None

    def monotonic(self) -> float:
        return (self._stopped_at or time.monotonic()) + self.ahead

    def stop(self) -> None:
        """From here on time passes only as `ahead` does."""
        self._stopped_at = time.monotonic()


@dataclass(eq=False)
class Call:
    model: str
    order: Order
    cancelled: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)


class Models:
    """Each call of a model plays its next script, or its last one again."""

    def __init__(self) -> None:
        self.scripts: dict[str, list[list[Act]]] = {"decoder": [[Last([1])]], "fallback": [[Last([2])]]}
        self.calls: list[Call] = []
        self.cancels: list[tuple[str, str]] = []
        self.cancel_tries = 0
        self.cancel_errors: Iterator[Exception] = iter(())
        self.status: DecoderStatus | str = WELL
        """The decoder's answer; as a text, its error."""
        self.fallback_error = ""
        self.asked = {"decoder": 0, "fallback": 0}
        self._lock = threading.Lock()

    def of(self, model: str) -> list[Call]:
        return [call for call in self.calls if call.model == model]

    def generate(self, model: str, order: Order) -> Iterator[ModelReply]:
        with self._lock:
            scripts = self.scripts[model]
            script = scripts[min(len(self.of(model)), len(scripts) - 1)]
            return self.play(model, order, script)

    def play(self, model: str, order: Order, script: list[Act]) -> Iterator[ModelReply]:
        call = Call(model, order)
        self.calls.append(call)
        return self._play(call, script)

    def _play(self, call: Call, script: list[Act]) -> Iterator[ModelReply]:
        try:
            for act in script:
                if isinstance(act, list):
                    yield ModelReply(call.model, act, final=False)
                elif isinstance(act, Last):
                    yield ModelReply(call.model, act.token_ids, final=True)
                elif act == HANG:
                    call.cancelled.wait(PATIENCE)
                    raise ModelError("cancelled by its id [cancelled]")
                elif isinstance(act, str):
                    raise ModelError(act)
                else:
                    act()
        finally:
            call.over.set()

    def control(self, model: str, word: str) -> str:
        if word.startswith(CANCEL):
            self._cancel(model, word.removeprefix(CANCEL))
            return "ok"
        assert word == "status"
        self.asked[model] += 1
        error = self.status if model == "decoder" else self.fallback_error or WELL
        if isinstance(error, DecoderStatus):
            return msgspec.json.encode(error).decode()
        raise ModelError(error)

    def _cancel(self, model: str, request_id: str) -> None:
        self.cancel_tries += 1
        for error in self.cancel_errors:
            raise error
        found = [call for call in self.of(model) if call.order.request_id == request_id and not call.over.is_set()]
        if not found:
            raise ModelError(f"no request with the id {request_id!r} is in flight")
        self.cancels.append((model, request_id))
        for call in found:
            call.cancelled.set()

    def release(self) -> None:
        """Every call that is in flight may end."""
        for call in self.calls:
            call.cancelled.set()
        for call in self.calls:
            assert call.over.wait(PATIENCE)


@dataclass(frozen=True)
class Sent:
    token_ids: list[int]
    final: bool
    served_by: str
    fallback_reason: str
    names: bool


class Caller:
    """Keeps what it is sent, and what it is sent too much."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.sent: list[Sent] = []
        self.error = ""
        self.reason = ""
        self.hung_up = False
        self.fits_fallback = self.continues = True
        self.ends = self.too_late = self.wrong_names = 0
        self._ended = threading.Event()

    def generate(self, model: str, order: Order) -> Iterator[ModelReply]:
        return self.models.generate(model, order)

    def send(self, reply: ModelReply, served_by: str, fallback_reason: str, names: bool) -> None:
        self.sent.append(Sent(reply.token_ids, reply.final, served_by, fallback_reason, names))
        self.wrong_names += served_by != reply.content
        self._take(reply.final)

    def fail(self, message: str, reason: FinishReason) -> None:
        self.error, self.reason = message, reason
        self._take(True)

    def is_cancelled(self) -> bool:
        self.too_late += self.ends > 0
        return self.hung_up

    def _take(self, end: bool) -> None:
        self.too_late += self.ends > 0
        self.ends += end
        if end:
            self._ended.set()

    @property
    def token_ids(self) -> list[int]:
        return list(itertools.chain.from_iterable(sent.token_ids for sent in self.sent))

    def end(self) -> Sent | None:
        """The last response; None if it was an error."""
        assert self._ended.wait(PATIENCE)
        return None if self.error else self.sent[-1]

    def has(self, *token_ids: int) -> None:
        until(lambda: self.token_ids == list(token_ids))


def end(answer: Sent | None) -> tuple[str, str]:
    assert answer
    return answer.served_by, answer.fallback_reason


class CountingBreaker(CircuitBreaker):
    """Knows which permits it gave, and which came back."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.given: list[Permit] = []
        self.recorded: list[Permit] = []

    def acquire(self, now: float) -> Permit | Refusal:
        permit = super().acquire(now)
        if isinstance(permit, Permit):
            self.given.append(permit)
        return permit

    def record(self, permit: Permit, outcome: Outcome, now: float) -> None:
        self.recorded.append(permit)
        super().record(permit, outcome, now)


class World:
    """All limits are far away, unless a setting says else or the clock is put forward."""

    def __init__(self, **settings: Any) -> None:
        self.models, self.clock = Models(), Clock()
        self.callers: list[Caller] = []
        self.rounds = 0
        options = {"fallback": "auto", "failsafe_patience": 60, "retry_base_delay": 0.001, **settings}
        with patch.object(failsafe, "CircuitBreaker", CountingBreaker):
            self.failsafe = Failsafe(Settings(**options), self.models.control)

    def submit(self, client_id: str = "client", streams: bool = True, **sampling: Any) -> Caller:
        return self.submit_for(Caller(self.models), client_id, streams, **sampling)

    def submit_for(self, caller: Caller, client_id: str = "client", streams: bool = True, **sampling: Any) -> Caller:
        self.callers.append(caller)
        self.failsafe.submit(caller, SamplingParams(**sampling), client_id, streams=streams)
        return caller

    def says(self, decoder: DecoderStatus | str = WELL, fallback: str = "") -> None:
        """What the models answer to the pulse from now on; it knows when this returns."""
        self.models.status, self.models.fallback_error = decoder, fallback
        self.feel()

    def feel(self) -> None:
        """Until the pulse has asked again, and the monitor has seen what it knows."""
        has_fallback = bool(self.failsafe._settings.fallback)
        before = self.models.asked.copy()
        # The second question begins when the answer to the first is read.
        until(lambda: self.models.asked["decoder"] >= before["decoder"] + 2)
        until(lambda: not has_fallback or self.models.asked["fallback"] >= before["fallback"] + 2)
        self.look()

    def look(self) -> None:
        """Until the monitor has looked at all requests."""
        rounds = self.rounds  # one may have begun already, and counts before it looks
        until(lambda: self.rounds >= rounds + 3)

    def passes(self, seconds: float) -> None:
        self.clock.ahead += seconds

    def sample(self, name: str, value_of_label: str = "") -> float:
        return self.samples().get((name, value_of_label), 0)

    def samples(self) -> dict[tuple[str, str], float]:
        return {(name, value_of_label): value for name, value_of_label, value in self.failsafe.samples()}

    def close(self) -> None:
        """All is over: each request ended once, nobody heard anything after, and each permit came back once."""
        until(lambda: not self.sample("requests_active"))
        self.models.release()
        for caller in self.callers:
            assert (caller.ends, caller.too_late, caller.wrong_names) == (1, 0, 0)
        names = [(call.model, call.order.request_id) for call in self.models.calls]
        assert len(set(names)) == len(names)  # or a cancel would meet another attempt
        breaker = self.failsafe._breaker
        assert isinstance(breaker, CountingBreaker)
        until(lambda: len(breaker.recorded) >= len(breaker.given))
        assert sorted(map(id, breaker.recorded)) == sorted(map(id, breaker.given))
        samples = self.samples()
        assert sum(value for (name, _), value in samples.items() if name == "outcomes_total") == len(breaker.given)
        ended = ("requests_served_total", "requests_failed_total")
        assert sum(value for (name, _), value in samples.items() if name in ended) == len(self.callers)

    def stop(self) -> None:
        self.models.release()
        self.failsafe.stop()


@contextmanager
def world(**settings: Any) -> Iterator[World]:
    """Asks, looks and tries again at once."""
    made = World(**settings)
    watch_load = made.failsafe._watch_load

    def count_round(now: float) -> None:
        made.rounds += 1
        watch_load(now)

    with (
        patch.object(failsafe, "time", made.clock),
        patch.object(pulse, "time", made.clock),
        patch.multiple(pulse, INTERVAL=0.001, IDLE_INTERVAL=0.001, FALLBACK_EVERY=1),
        patch.multiple(failsafe, MONITOR_INTERVAL=0.001, MONITOR_SHARE=1.0, CANCEL_PAUSE=0.001),
        patch.object(made.failsafe, "_watch_load", count_round),
    ):
        made.failsafe.start()
        try:
            yield made
            made.close()
        finally:
            made.stop()
