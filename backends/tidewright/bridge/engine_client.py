"""Starts the engine process, talks to it, notices when it dies or hangs, and starts it again."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeVar

import msgspec

from tidewright.bridge.engine_process import KILL_TIMEOUT, EngineProcess, EngineStartError, Standby
from tidewright.bridge.liveness import Work
from tidewright.engine.messages import (
    AdapterChanged,
    Begin,
    EngineConfig,
    EngineStats,
    Failed,
    Heartbeat,
    Ready,
    SequenceOutput,
    Shutdown,
    StepOutputs,
    ToEngine,
    decode_to_bridge,
    encode,
)
from tidewright.errors import EngineUnavailableError
from tidewright.logs import event
from tidewright.memory.account import MemoryAccount

log = logging.getLogger(__name__)

FIRST_BACKOFF, LONGEST_BACKOFF = 0.1, 10.0  # seconds between two starts
LONGEST_WORK = 5.0  # seconds that work alone passes for a sign of life
QUIET = 3.0  # seconds without a message and without work, after which an engine is in trouble
POLL_INTERVAL = 0.25  # seconds; how often deadlines are looked at
STOP_TIMEOUT = 3.0  # seconds from the polite request to SIGKILL
LEAST_STEP = 128  # tokens: smaller steps take hardly less memory, and the next engine may find more

_T = TypeVar("_T")


@dataclass(frozen=True)
class EngineEvents:
    """What the client reports, always from its one thread."""

    outputs: Callable[[list[SequenceOutput]], None]
    stats: Callable[[EngineStats], None]
    up: Callable[[Ready], None]
    lost: Callable[[str], None]
    """An engine that was up is gone, or one did not come up again, with the cause; the next start is on its way."""
    out_of_memory: Callable[[str], None]
    """As `lost`, but it ended itself for lack of memory: no request is to blame. The next one's steps are smaller."""
    adapter: Callable[[AdapterChanged], None] = lambda _: None


class EngineClient:
    """One engine process, restarted with backoff whenever it ends unasked.

    Beside it another one stands by, which has imported what it needs, but has no model yet: this halves the pause.
    Its thread starts the process, so that the kernel's parent-death signal is bound to a thread that lives as
    long as the client does.
    """

    def __init__(
        self,
        config: EngineConfig,
        events: EngineEvents,
        *,
        start_timeout: float,
        heartbeat_timeout: float,
        replayed_tokens: Callable[[], int] = lambda: 0,
    ) -> None:
        """`replayed_tokens`: of the longest request that is in flight, at its end."""
        self._config = config
        self._kept = Begin()  # what the first engine decided, and operators since: for engines to come
        self._events, self._replayed_tokens = events, replayed_tokens
        self._start_timeout = start_timeout
        self._heartbeat_timeout = heartbeat_timeout
        self._send_lock = threading.Lock()
        self._connection: Connection | None = None  # set while the engine takes requests
        self._standby = Standby()
        self._heard_at = self._worked_at = 0.0  # time.monotonic() when it last said something, and did something
        self._work: Work | None = None
        self._lacked_memory = False  # the engine that ended last
        self._quiet = 0.0  # seconds without a message and without work
        self._stopping = threading.Event()
        self._stop_by = math.inf  # time.monotonic(); then the engine is killed
        self._first_start_over = threading.Event()
        self._came_up = False  # at least once
        self._has_answered = False  # the one that runs, or that ran last
        self._cause = "the engine is starting"
        self._thread = threading.Thread(target=self._supervise, name="engine-client", daemon=True)
        self.restarts = 0
        self.restarted_at = 0.0
        """Unix time of the last; 0 if there was none."""

    def start(self) -> None:
        """Start the engine and wait until it has loaded its model.

        Raises:
            EngineStartError: it could not; nothing is left running.
        """
        self._thread.start()
        self._first_start_over.wait()
        if not self._came_up:
            self._thread.join()
            raise EngineStartError(self._cause)

    @property
    def available(self) -> bool:
        """An engine is up and takes requests."""
        return self._connection is not None

    @property
    def alive(self) -> bool:
        """Its thread goes on, so that an engine that is gone comes back."""
        return self._thread.is_alive()

    @property
    def trouble(self) -> str:
        """Why no engine computes; empty if all is well, however long a step takes."""
        if not self._connection:
            return f"the engine is not available ({self._cause})"
        # A heartbeat may be late by itself.
        if (quiet := self._quiet) > max(QUIET, 2 * self._config.heartbeat_interval):
            return (
                f"the engine has said and computed nothing for {quiet:.0f} s; after {self._heartbeat_timeout:g} s "
                "(heartbeat_timeout) another takes its place"
            )
        return ""

    def silence(self) -> float:
        """Seconds since the engine that is up gave a sign of life, 0 if none is: a message, or for a while work.

        On a busy machine a step can take long.
        """
        if not self._connection:
            return 0.0
        now = time.monotonic()
        silence = now - self._heard_at
        return max(silence if silence > LONGEST_WORK else now - max(self._heard_at, self._worked_at), 0.0)

    def send(self, message: ToEngine) -> None:
        """Send one message.

        Raises:
            EngineUnavailableError: no engine is there to take it.
        """
        with self._send_lock:
            if self._connection is None:
                raise EngineUnavailableError(f"the engine is not available ({self._cause}); try again shortly")
            try:
                self._connection.send_bytes(encode(message))
            except OSError as error:
                raise EngineUnavailableError(f"the engine just went away ({error}); try again shortly") from None

    def stop(self) -> None:
        """End the engine and the client's thread, within about `STOP_TIMEOUT`."""
        self._stop_by = time.monotonic() + STOP_TIMEOUT
        self._stopping.set()
        # Another thread may have the lock, in a send to an engine that is stuck.
        if self._send_lock.acquire(timeout=POLL_INTERVAL):
            try:
                if self._connection:
                    self._connection.send_bytes(encode(Shutdown()))
            except OSError:
                pass  # it has ended
            finally:
                self._send_lock.release()
        self._thread.join(STOP_TIMEOUT + 2 * KILL_TIMEOUT)  # the engine's, and that of the one that stands by

    def _supervise(self) -> None:
        backoff = FIRST_BACKOFF
        try:
            while not self._stopping.is_set():
                started = time.monotonic()
                self._run_engine()
                if self._stopping.is_set():
                    break
                if not self._came_up:
                    break  # a first start that fails is for the operator, not for a retry
                # One that had answered others before it died over a request would be as well again: nobody's poison
                # makes them wait longer.
                if self._has_answered or time.monotonic() - started > LONGEST_BACKOFF:
                    backoff = FIRST_BACKOFF
                extra = event("engine_died", cause=self._cause)
                log.error("engine lost: %s; starting it again in %.1f s", self._cause, backoff, extra=extra)
                self._stopping.wait(backoff)
                backoff = min(2 * backoff, LONGEST_BACKOFF)
                self.restarts += 1
                self.restarted_at = time.time()
        finally:
            self._standby.drop()
            self._first_start_over.set()

    def _run_engine(self) -> None:
        """Run one engine process until it ends, by itself or by us, and keep why it ended."""
        cause, process, self._lacked_memory, self._has_answered = "", None, False, False
        try:
            process = self._standby.take() or EngineProcess(self._config)
            begin = msgspec.structs.replace(self._kept, replayed_tokens=self._replayed_tokens())
            process.connection.send_bytes(encode(begin))
            cause = self._read_messages(process.connection)
        except (EOFError, OSError):
            pass  # how the process ended says more
        except EngineStartError as error:
            cause = str(error)
        except Exception as error:
            # Whatever it was, the next engine is started, and health says what happened.
            log.exception("the engine is given up")
            cause = f"{type(error).__name__}: {error}"
        # First of all: a send to a stuck engine blocks, with the lock held, for as long as the engine is there.
        patience = max(self._stop_by - time.monotonic(), 0.0) if self._stopping.is_set() else 0.5
        ended = process.end(patience) if process else "it could not be started"
        with self._send_lock:
            self._connection = None
            self._cause = cause or ended
        self._quiet = 0.0
        if process:
            process.connection.close()
        if self._came_up and not self._stopping.is_set():
            self._report(self._events.out_of_memory if self._lacked_memory else self._events.lost, self._cause)

    def _report(self, event: Callable[[_T], None], what: _T) -> None:
        """An error of the listener must not end the engine, or its supervision."""
        try:
            event(what)
        except Exception:
            log.exception("what the engine said could not be handed on")

    def _read_messages(self, connection: Connection) -> str:
        """Hand on what the engine says until a deadline passes or (EOFError) it is gone; return the cause."""
        deadline = time.monotonic() + self._start_timeout
        while True:
            if self._connection and self._config.standby:
                self._standby.keep(self._config)
            if self._stopping.is_set() and self._connection is None:
                return "stopped while starting"
            if not connection.poll(POLL_INTERVAL):
                now = time.monotonic()
                if self._work and self._work.went_on():
                    self._worked_at = now
                self._quiet = now - max(self._heard_at, self._worked_at) if self._connection else 0.0
                if now > self._stop_by:
                    return f"did not end within {STOP_TIMEOUT:g} s"
                if now > deadline:
                    return (
                        f"no heartbeat for {self._heartbeat_timeout:g} s"
                        if self._connection
                        else f"the model was not loaded within {self._start_timeout:g} s (start_timeout)"
                    )
                continue
            message = decode_to_bridge(connection.recv_bytes())
            self._heard_at, self._quiet = time.monotonic(), 0.0
            deadline = self._heard_at + self._heartbeat_timeout
            if isinstance(message, StepOutputs):
                self._has_answered = self._has_answered or any(
                    one.token_ids or one.embedding for one in message.outputs
                )
                self._report(self._events.outputs, message.outputs)
            elif isinstance(message, Heartbeat):
                self._keep(message.stats.memory)
                self._report(self._events.stats, message.stats)
            elif isinstance(message, AdapterChanged):
                self._report(self._events.adapter, message)
            elif isinstance(message, Failed):
                if message.step_tokens:
                    self._make_steps_smaller(message.step_tokens)
                return message.message
            else:
                # What it accepts, every later one has to take again, and means the same with a request of no length.
                self._kept = msgspec.structs.replace(
                    self._kept,
                    num_blocks=self._kept.num_blocks or message.num_blocks,
                    first_max_model_len=self._kept.first_max_model_len or message.max_model_len,
                )
                self._keep(message.memory)
                self._work = Work(message.pid)
                self._connection = connection
                self._standby.engine_up()
                self._report(self._events.up, message)
                self._came_up = True
                self._first_start_over.set()
                extra = event("engine_restarted" if self.restarts else "engine_ready", engine_pid=message.pid)
                what = message.pid, message.num_blocks, message.device
                log.info("engine %d ready: %d KV blocks on %s", *what, extra=extra)

    def _keep(self, memory: MemoryAccount) -> None:
        """The size that the KV cache should have, now that it may have been set anew."""
        if memory.block:
            sizes = {"num_blocks": memory.target_blocks, "most_blocks": memory.most_blocks}
            self._kept = msgspec.structs.replace(self._kept, **sizes, wished_blocks=memory.wished_blocks)

    def _make_steps_smaller(self, tokens: int) -> None:
        """Of all engines to come: with several ranks each further try of more would cost a restart."""
        tokens = max(tokens, LEAST_STEP)
        if tokens >= self._config.max_batched_tokens:
            return
        self._lacked_memory = True
        log.warning("steps of engines to come have up to %d tokens", tokens, extra=event("out_of_memory"))
        self._config = msgspec.structs.replace(self._config, max_batched_tokens=tokens)
        self._standby.drop()  # which has been told otherwise
