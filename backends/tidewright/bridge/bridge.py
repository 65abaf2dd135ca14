"""Between Triton and the engine: takes requests, keeps an engine running for them, and says how both are.

Six threads meet here. Triton's calls `submit`; the feeder gives the engine its work (feeder.py), the engine client's
delivers tokens; the sender turns them into responses (in_flight.py, sender.py); the canceller asks Triton who hung up;
the watch looks for what hangs or is overdue.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tidewright.bridge.active_request import ActiveRequest, Origin, ids_of
from tidewright.bridge.adapters import Adapter, AdapterChange, Done, unknown_adapter
from tidewright.bridge.answers import Answers
from tidewright.bridge.canceller import Canceller
from tidewright.bridge.drain import Drain
from tidewright.bridge.engine_client import EngineClient, EngineEvents
from tidewright.bridge.feeder import Feeder
from tidewright.bridge.in_flight import RequestsInFlight
from tidewright.bridge.outgoing import Reply
from tidewright.bridge.output_sequence import OutputSequence
from tidewright.bridge.request import GenerationRequest
from tidewright.bridge.response import Responder
from tidewright.bridge.stats import CumulativeStats, RequestStats
from tidewright.bridge.traces import BridgeTraces
from tidewright.config import Settings
from tidewright.cores import usable_cores
from tidewright.engine.messages import EngineConfig, EngineStats, Ready
from tidewright.engine.targets import Targets
from tidewright.errors import (
    CancelledError,
    EngineUnavailableError,
    InvalidRequestError,
    RequestError,
    TimedOutError,
    seconds_text,
)
from tidewright.logs import event
from tidewright.schema import DRAINING, PROTOCOL, STUCK, DecoderStatus
from tidewright.tokenization import Tokenizer

log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3  # in a row; then nobody waits for the engine any longer
WATCH_INTERVAL = 0.1  # seconds
LATE = 0.5  # seconds after a request's deadline in which an engine that is up should have ended it
UNLOAD_GRACE = 10.0  # seconds, at most, for requests of a model that is being unloaded
JOIN_TIMEOUT = 2.0  # seconds for a thread to end; Triton's own end must not wait for one that hangs


class Bridge:
    """Owns the engine client and every request between Triton and the engine."""

    def __init__(
        self,
        settings: Settings,
        config: EngineConfig,
        tokenizer: Tokenizer,
        is_loaded: Callable[[], bool] = lambda: True,
        traces: BridgeTraces | None = None,
    ) -> None:
        """`is_loaded`: whether Triton still gives this model requests; asked now and then while it has some."""
        self._tokenizer = tokenizer
        self._model_name, self._max_running = Path(config.model_dir).name, config.max_running
        self._max_waiting = config.max_waiting
        self._ids = itertools.count(1)
        self._streaming_share = settings.streaming_share
        self._stopping = threading.Event()
        self._drain = Drain(settings.shutdown_grace)
        self._client = EngineClient(
            config,
            EngineEvents(
                lambda outputs: self._in_flight.take_outputs(outputs),
                self._on_stats,
                self._on_up,
                self._on_lost,
                self._on_out_of_memory,
                lambda change: self._feeder.adapter_changed(change),
            ),
            start_timeout=settings.start_timeout,
            heartbeat_timeout=settings.heartbeat_timeout,
            replayed_tokens=self._longest_in_flight,
        )
        self._watch = threading.Thread(target=self._watch_loop, name="watch", daemon=True)
        self._failed_starts = 0  # of engines, since one was up
        self._failing = ""  # why nobody waits for the engine any longer
        self._cumulative_stats = CumulativeStats()
        self.request_stats = RequestStats()
        self.traces = traces
        targets = Targets(config.ttft_target, config.tpot_target, config.class_targets)
        answers = Answers(self.request_stats, traces, targets)
        self._feeder = Feeder(self._client.send, self._give_up)
        self._in_flight = RequestsInFlight(config.max_running + config.max_waiting, answers, self._feeder)
        self._ask_triton = is_loaded
        self._canceller = Canceller(
            self._in_flight.changed, self._in_flight.active, self._hung_up, self._is_loaded, self._unloaded
        )
        self.engine: Ready | None = None
        """What the running engine said of itself; kept while it restarts."""

    @property
    def engine_up(self) -> bool:
        return self._client.available

    @property
    def trouble(self) -> str:
        """Why nobody should send requests here now; empty if all is well.

        A heart that beats stands for all ranks: see engine/process.py.
        """
        if self._drain.has_begun:
            return DRAINING
        if stuck := self._stuck:
            return f"{STUCK}{stuck}"
        return self._client.trouble

    @property
    def _stuck(self) -> str:
        """What only a new process can mend."""
        hanging, seconds = self._in_flight.sender.stuck
        if hanging:
            return f"Triton has not taken {hanging} responses for up to {seconds:.0f} s, as if their caller had died"
        threads = {
            "sender": self._in_flight.sender.alive,
            "feeder": self._feeder.alive,
            "canceller": self._canceller.alive,
            "watch": self._watch.is_alive(),
            "engine client": self._client.alive,
        }
        return next((f"the {name} thread has ended; see the log" for name, alive in threads.items() if not alive), "")

    @property
    def status(self) -> DecoderStatus:
        stats, engine = self.engine_stats, self.engine
        since = self._in_flight.waiting_since(stats.waiting)
        return DecoderStatus(
            trouble=self.trouble,
            draining=self._drain.has_begun,
            silence=self._client.silence(),
            waiting=stats.waiting / max(self._max_waiting, 1),
            wait=0.0 if since is None else time.monotonic() - since,
            kv_usage=stats.kv_usage,
            active=self.active,
            max_model_len=engine.max_model_len if engine else 0,
            pid=os.getpid(),
            model=self._model_name,
            tokenizer=self._tokenizer.fingerprint,
            max_running=self._max_running,
            embedding_size=engine.embedding_size if engine else 0,
            tells_details=True,
            tells_timings=True,
            knows_tenants=True,
            knows_targets=True,
            kv_tokens=stats.blocks_total * engine.block_size if engine else 0,
            protocol=PROTOCOL,
        )

    @property
    def engine_restarts(self) -> int:
        return self._client.restarts

    @property
    def engine_restarted_at(self) -> float:
        """Unix time of the engine's last restart; 0 if there was none."""
        return self._client.restarted_at

    @property
    def batch_places(self) -> int:
        """Sequences that a batch may have."""
        return self._max_running

    @property
    def engine_stats(self) -> EngineStats:
        """Gauges of the running engine, zero without one; counters over all engines that there were."""
        return self._cumulative_stats.read()

    @property
    def active(self) -> int:
        """Requests in flight."""
        return len(self._in_flight.active)

    def start(self) -> None:
        """Start the engine and wait for its model; raises `EngineStartError`."""
        self._feeder.start()
        try:
            self._client.start()
        except Exception:
            self._feeder.stop(JOIN_TIMEOUT)
            raise
        self._in_flight.sender.start()
        self._canceller.start()
        self._watch.start()

    def drain(self, why: str = "the server is shutting down", longest: float = math.inf) -> None:
        """Take no new requests; those in flight get `shutdown_grace` seconds, then they end with the reason."""
        with self._in_flight.changed:  # one that is being submitted is taken, or sees it
            self._drain.begin(why, longest)

    def stop(self) -> None:
        """End the engine; what is still in flight ends with `EngineUnavailableError`."""
        self._stopping.set()
        self._client.stop()
        self._feeder.stop(JOIN_TIMEOUT)
        self._fail_all("the server is shutting down")
        self._in_flight.sender.stop(JOIN_TIMEOUT)
        self._canceller.stop(JOIN_TIMEOUT)
        self._watch.join(JOIN_TIMEOUT)

    def submit(
        self,
        parsed: GenerationRequest,
        responder: Responder,
        client_id: str = "",
        arrived_at: float | None = None,
        origin: Origin | None = None,
    ) -> None:
        """Queue a valid request; its answer comes through `responder`. `client_id` is what `cancel` calls it.

        `arrived_at`: on time.monotonic(), now by default. `origin`: the trace that it is part of.

        Raises:
            TimedOutError: its timeout is over already, and its caller has no tokens, which would be the answer.
            OverloadedError: as many sequences as may run and wait are already in flight.
            InvalidRequestError: it has more sequences than may ever be in flight, or its adapter is not loaded.
            EngineUnavailableError: the engine does not come up again, or the server is draining.
        """
        arrived_at = time.monotonic() if arrived_at is None else arrived_at
        sampling = parsed.sampling
        deadline = None if sampling.timeout is None else arrived_at + sampling.timeout
        if deadline is not None and deadline <= time.monotonic() and not parsed.resume_ids:
            given = seconds_text(sampling.timeout)
            raise TimedOutError(f"timed out at once: timeout is {given} s; raise it or leave it out")
        ids = [next(self._ids) for _ in range(sampling.n)]
        request = ActiveRequest(parsed, responder, self._tokenizer, ids, arrived_at, deadline, client_id, origin)
        with self._in_flight.changed:
            self._check_open()
            self._in_flight.check_room(sampling.n)
            if parsed.adapter:
                self._check_adapter(parsed.adapter)
            self._in_flight.add(request)
        log.debug("received; the engine has it as %s", ids, extra=event("request_received", **ids_of(request)))
        for sequence in request.sequences:
            self._feeder.submit(sequence)

    def reply(self, send: Callable[[], None]) -> None:
        """Have the sender send an answer to something else than a request for text.

        Triton's thread must not send it: a caller that has died would block it.
        """
        self._in_flight.reply(Reply(send))

    def cancel(self, client_id: str) -> int:
        """End the requests of that id, which their clients chose, or that attempt at one; how many are in flight."""
        return self._in_flight.cancel(client_id)

    def resize_cache(self, size: str) -> None:
        """Have the engine's KV cache grow or shrink to so many bytes. It happens between two steps, and requests go on.

        Raises:
            InvalidRequestError: that is no size which the KV cache can have.
            EngineUnavailableError: no engine is up.
        """
        self._feeder.resize_cache(self._blocks(size, is_limit=False))

    def limit_cache(self, size: str) -> None:
        """Of the budget that several models share, the KV cache may have so many bytes from now on.

        Raises as `resize_cache`.
        """
        self._feeder.limit_cache(self._blocks(size, is_limit=True))

    def _blocks(self, size: str, is_limit: bool) -> int:
        """Of so many bytes of KV cache, as it is or as it may become."""
        account = self.engine_stats.memory
        if not account.block:
            raise EngineUnavailableError("the engine has not told its memory yet; try again")
        most = max(account.kv_most, account.kv_room * is_limit)
        if not (size.isascii() and size.isdigit() and account.kv_least <= int(size[:20]) <= most):
            whose = "the budgets of all models pay" if is_limit else "memory_budget pays"
            raise InvalidRequestError(
                f"the KV cache can have {account.kv_least} to {most} bytes, not {size[:20]!r}: at least one request of "
                f"max_model_len, at most what {whose} for"
            )
        return int(size) // account.block

    @property
    def adapters(self) -> list[Adapter]:
        """The LoRA adapters that are loaded, or are about to be, or to go; in order of their loading."""
        return list(self._feeder.adapters.by_name.values())

    @property
    def adapter_counts(self) -> Mapping[AdapterChange, int]:
        return self._feeder.adapters.counts

    def load_adapter(self, name: str, path: str, done: Done) -> None:
        """Load a LoRA adapter from a folder below `adapter_folder`. `done` gets it, or the reason, from another thread.

        Raises:
            EngineUnavailableError: the engine does not come up again, or the server is draining.
        """
        self._check_open()
        self._feeder.load_adapter(name, path, done)

    def unload_adapter(self, name: str, done: Done) -> None:
        """Give it to no further request; `done` is called once those that have it have ended, and it is gone.

        Raises as `load_adapter`.
        """
        self._check_open()
        self._feeder.unload_adapter(name, done)

    def _check_open(self) -> None:
        self._drain.check()
        if self._failing:
            raise EngineUnavailableError(self._failing)

    def _check_adapter(self, name: str) -> None:
        known = self._feeder.adapters.by_name
        adapter = known.get(name)
        if adapter is None or adapter.state == "unloading":
            raise unknown_adapter(name, known)

    def _on_stats(self, stats: EngineStats) -> None:
        self._cumulative_stats.update(stats)

    def _on_up(self, ready: Ready) -> None:
        self.engine = ready
        # A GPU's work is not held up.
        on_cpu = ready.device.startswith("cpu")
        self._in_flight.outgoing.share = self._streaming_share * usable_cores() if on_cpu else 1.0
        self._failed_starts, self._failing = 0, ""
        self._feeder.engine_up()

    def _on_out_of_memory(self, cause: str) -> None:
        self._on_lost(cause, to_blame=False)

    def _longest_in_flight(self) -> int:
        """Tokens of prompt and output, at most, as the engine that took them counts."""
        if not (engine := self.engine):
            return 0
        # Embeddings have no output.
        return min(self._in_flight.longest(generates=not engine.embedding_size), engine.max_model_len)

    def _on_lost(self, cause: str, to_blame: bool = True) -> None:
        self._cumulative_stats.engine_lost()
        self._feeder.engine_lost(to_blame)
        self._failed_starts += 1
        if self._failed_starts > MAX_FAILED_STARTS:  # the first was up
            self._failing = (
                f"the engine died, and {MAX_FAILED_STARTS} starts failed since ({cause}); see the server's log"
            )
            self._fail_all(self._failing)
            self._feeder.fail_adapters(self._failing)

    def _give_up(self, sequence: OutputSequence, error: RequestError) -> None:
        self._in_flight.fail(sequence.request, error)

    def _fail_all(self, message: str) -> None:
        self._in_flight.fail_all(EngineUnavailableError(message))

    def _hung_up(self, request: ActiveRequest) -> None:
        self._in_flight.fail(request, CancelledError("cancelled by the client"))

    def _is_loaded(self) -> bool:
        # Asked while it ends, Triton can crash the stub, and all streams with it. Who drains needs no answer.
        return self._drain.has_begun or self._ask_triton()

    def _unloaded(self) -> None:
        """Triton waits for the last request, however long that takes, and says nothing."""
        self.drain("the model is being unloaded", UNLOAD_GRACE)

    def _watch_loop(self) -> None:
        while not self._stopping.wait(WATCH_INTERVAL):
            for look in (self._in_flight.sender.watch, self._end_overdue, self._end_drain):
                try:
                    look()
                except Exception:
                    log.exception("the bridge could not look after its requests")

    def _end_drain(self) -> None:
        if message := self._drain.overdue:
            self._fail_all(message)

    def _end_overdue(self) -> None:
        """Ends requests whose deadline has passed and that no engine has ended: none is up, or it hangs."""
        now = time.monotonic()
        late = now - LATE if self._client.available else now
        self._in_flight.end_overdue(late, self._client.trouble or "the engine is busy")
