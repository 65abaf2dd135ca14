"""What the engine is given, in order, by one thread: sequences, their aborts, and all of it again when it died.

LoRA adapters go the same way (adapters.py), so that an engine has loaded them before the sequences that need them.

Replay: a sequence that was in flight when an engine died goes to the next one with the tokens that came so far, and
goes on after the last of them. A draw depends on the tokens before it and on nothing else, so nothing else is lost.

Quarantine: one of the sequences may be what kills the engine, and nobody sees which. One that got no token between two
deaths is a suspect. Suspects run one at a time, once those that are not have had a token of this engine, until each got
a token or ended; if the engine dies in such a trial, the one on trial is given up. New ones queue for a trial
meanwhile. An engine that ended for lack of memory says so, and then it was none of them.

Probation: what comes next from the tenant of one that was given up is a suspect at once, so that its further poison
costs one engine each instead of several. Nobody else has to wait for these trials, so the engine may die of one that
came meanwhile. If there is such a one without a token, nobody is given up: it is a death of each. After two of them the
one on trial, too, is tried with nobody new beside it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import msgspec

from tidewright.bridge.adapters import Adapters, Done
from tidewright.bridge.output_sequence import OutputSequence
from tidewright.engine.messages import Abort, AdapterChanged, LimitCache, ResizeCache, Submit, ToEngine
from tidewright.errors import EngineUnavailableError, InvalidRequestError, RequestError
from tidewright.schema import KILLS_ENGINES

log = logging.getLogger(__name__)

TRIES = 2  # engines that may die over a sequence before it is a suspect
PROBATION = 16  # sequences of a tenant that must be acquitted
MOST_ON_PROBATION = 256  # tenants


class Feeder:
    """Every method only leaves a note for the thread: none of them blocks, not even on an engine that is stuck."""

    def __init__(
        self, send: Callable[[ToEngine], None], give_up: Callable[[OutputSequence, RequestError], None]
    ) -> None:
        self._send = send
        self._give_up = give_up
        self._notes: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="feeder", daemon=True)
        self.adapters = Adapters(self._tell, self._has_adapter)
        # The thread's own:
        self._sequences: dict[int, OutputSequence] = {}  # not yet ended, in order of arrival
        self._given: set[int] = set()  # to the engine that runs
        self._engine_up = False
        self._trial: OutputSequence | None = None
        self._probation: dict[str, int] = {}  # by tenant: sequences that are still to be acquitted

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        self._notes.put(None)
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, sequence: OutputSequence) -> None:
        self._notes.put(lambda: self._take(sequence))

    def drop(self, sequence: OutputSequence) -> None:
        """It ended; the engine is told, unless it knows."""
        self._notes.put(lambda: self._drop(sequence))

    def acquit(self, sequence: OutputSequence) -> None:
        """A suspect got a token: not with it did the engines die."""
        self._notes.put(lambda: self._acquit(sequence))

    def engine_up(self) -> None:
        self._notes.put(self._feed)

    def engine_lost(self, to_blame: bool = True) -> None:
        """`to_blame`: one of the sequences may be the cause; or an adapter, if there were none."""
        self._notes.put(lambda: self._lose(to_blame))

    def resize_cache(self, num_blocks: int) -> None:
        self._notes.put(lambda: self._tell(ResizeCache(num_blocks)))

    def limit_cache(self, most_blocks: int) -> None:
        self._notes.put(lambda: self._tell(LimitCache(most_blocks)))

    def load_adapter(self, name: str, path: str, done: Done) -> None:
        self._notes.put(lambda: self.adapters.load(name, path, done))

    def unload_adapter(self, name: str, done: Done) -> None:
        self._notes.put(lambda: self.adapters.unload(name, done))

    def adapter_changed(self, change: AdapterChanged) -> None:
        self._notes.put(lambda: self.adapters.changed(change))

    def fail_adapters(self, cause: str) -> None:
        """No engine comes up any more: nobody waits for a load any longer."""
        self._notes.put(lambda: self.adapters.fail(cause))

    def _loop(self) -> None:
        while note := self._notes.get():
            try:
                note()
            except EngineUnavailableError:
                pass  # it just died: `engine_lost` is on its way, and later `engine_up`
            except Exception:
                log.exception("the engine could not be given its work")
        self.adapters.fail("the server is shutting down")

    def _tell(self, message: ToEngine) -> None:
        try:
            self._send(message)
        except EngineUnavailableError:
            self._engine_up = False  # `engine_lost` is on its way; until then nobody is given, or put on trial
            raise

    def _take(self, sequence: OutputSequence) -> None:
        waits = self._on_probation(sequence) or self._all_wait()
        self._sequences[sequence.engine_request_id] = sequence
        try:
            if waits:
                if self._trial is None:
                    self._next_trial()
            elif self._engine_up:
                self._give(sequence)
        finally:
            sequence.accepted = True  # whenever it is given after this

    def _give(self, sequence: OutputSequence) -> None:
        sequence.given(time.monotonic())
        sequence.progressed = False
        self._given.add(sequence.engine_request_id)
        try:
            self._tell(_submission(sequence))
        except EngineUnavailableError:
            self._given.discard(sequence.engine_request_id)  # not of this one does the engine die
            raise
        except Exception as error:
            # Of this one alone: those behind it, and the note that it is part of, must go on.
            log.exception("a request could not be handed to the engine")
            self._give_up(sequence, _refusal(error))

    def _drop(self, sequence: OutputSequence) -> None:
        if self._sequences.pop(sequence.engine_request_id, None) is None:
            return
        is_given = sequence.engine_request_id in self._given
        self._given.discard(sequence.engine_request_id)
        if self._trial is None or self._trial is sequence:
            self._next_trial()
        if is_given and not sequence.engine_is_done:
            self._tell(Abort(sequence.engine_request_id))
        if sequence.request.parsed.adapter:
            self.adapters.settle()

    def _has_adapter(self, name: str) -> bool:
        return any(sequence.request.parsed.adapter == name for sequence in self._sequences.values())

    def _acquit(self, sequence: OutputSequence) -> None:
        tenant = _tenant(sequence)
        if sequence.deaths and (left := self._probation.pop(tenant, 0)) > 1:
            self._probation[tenant] = left - 1
        sequence.deaths = 0
        if self._trial is None or self._trial is sequence:
            self._next_trial()

    def _feed(self) -> None:
        self._engine_up = True
        self.adapters.engine_up()
        all_wait = self._all_wait()
        for sequence in self._sequences.values():
            is_new = not sequence.token_ids
            if sequence.deaths < TRIES and not (is_new and (all_wait or self._on_probation(sequence))):
                self._give(sequence)
        self._next_trial()
        self.adapters.settle()

    def _next_trial(self) -> None:
        """Once those that an engine died with have had a token of this one, or the trial could be blamed for them."""
        self._trial = None
        if not self._engine_up or len(self._given) == len(self._sequences):
            return
        running = [self._sequences[request_id] for request_id in self._given & self._sequences.keys()]
        if any(sequence.deaths and not sequence.progressed for sequence in running):
            return
        self._trial = next(s for s in self._sequences.values() if s.engine_request_id not in self._given)
        self._trial.deaths = max(self._trial.deaths, TRIES)  # so that its first token acquits it
        self._give(self._trial)

    def _all_wait(self) -> bool:
        """Someone is on trial, or is to be, and nobody new may be beside it."""
        if not self._engine_up or (self._trial is None and len(self._given) == len(self._sequences)):
            return False
        on_trial = [s for s in self._sequences.values() if s is self._trial or s.engine_request_id not in self._given]
        return any(s.deaths >= (2 * TRIES if self._on_probation(s) else TRIES) for s in on_trial)

    def _lose(self, to_blame: bool) -> None:
        self._engine_up = False
        self.adapters.engine_lost(to_blame and not self._given)
        had = [self._sequences[request_id] for request_id in self._given & self._sequences.keys()]
        unproven = [sequence for sequence in had if not sequence.progressed]
        alone = len(unproven) == 1 and unproven[0] is self._trial
        guilty = self._trial if to_blame and alone else None
        if guilty:
            del self._sequences[guilty.engine_request_id]
        for sequence in had:
            if sequence.progressed:
                sequence.deaths = int(to_blame)
            elif to_blame:
                sequence.deaths += 1
        self._given.clear()
        self._trial = None
        if guilty:
            self._put_on_probation(_tenant(guilty))
            self._give_up(guilty, EngineUnavailableError(KILLS_ENGINES))

    def _on_probation(self, sequence: OutputSequence) -> bool:
        return _tenant(sequence) in self._probation

    def _put_on_probation(self, tenant: str) -> None:
        if not tenant:
            return  # requests of anybody
        self._probation.pop(tenant, None)
        if len(self._probation) >= MOST_ON_PROBATION:
            del self._probation[next(iter(self._probation))]
        self._probation[tenant] = PROBATION


def _tenant(sequence: OutputSequence) -> str:
    return sequence.request.parsed.sampling.tenant


def _refusal(error: Exception) -> RequestError:
    """MemoryError and the like say nothing of the request; what can't be encoded is its own fault."""
    if isinstance(error, (ValueError, TypeError, OverflowError, RecursionError)):
        return InvalidRequestError(f"the request can't be handed to the engine: {error}")
    return RequestError(f"the request could not be handed to the engine: {error or type(error).__name__}")


def _submission(sequence: OutputSequence) -> Submit:
    """The sequence from where it stands. The first of a request's sequences alone reports the prompt that all share."""
    request, parsed = sequence.request, sequence.request.parsed
    sampling = parsed.sampling
    if sequence.index or sequence.token_ids:
        assert sampling.seed is not None
        seed = (sampling.seed + sequence.index) % 2**63
        sampling = msgspec.structs.replace(sampling, seed=seed, prompt_logprobs=None)
    return Submit(
        sequence.engine_request_id,
        parsed.prompt_token_ids,
        sampling,
        request.deadline,
        parsed.bad_words_ids,
        list(sequence.token_ids),
        request.trace_id,
        parsed.adapter,
        sequence.accepted,
    )
