"""Starts the engine process, talks to it, notices when it dies or hangs, and starts it again."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from tidewright.bridge.liveness import Work
from tidewright.engine.messages import (
    Begin,
    Configure,
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

log = logging.getLogger(__name__)

FIRST_BACKOFF, LONGEST_BACKOFF = 0.1, 10.0  # seconds between two starts
LONGEST_WORK = 5.0  # seconds that work alone passes for a sign of life
POLL_INTERVAL = 0.25  # seconds; how often deadlines are looked at
STOP_TIMEOUT = 3.0  # seconds from the polite request to SIGKILL
STANDBY_DELAY = 3.0  # seconds that an engine is up before the next one gets ready to replace it

# A step's large tensors come and go: kept memory saves the page faults (a tenth of a long prefill's time on a CPU), and
# huge pages save some more. glibc reads this at the start of a process only; other C libraries ignore it.
_MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"
    ":glibc.malloc.hugetlb=1"
}


class EngineStartError(RuntimeError):
    """The engine did not start; the message is its own."""


@dataclass(frozen=True)
class EngineEvents:
    """What the client reports, always from its one thread."""

    outputs: Callable[[list[SequenceOutput]], None]
    stats: Callable[[EngineStats], None]
    up: Callable[[Ready], None]
    lost: Callable[[str], None]
    """An engine that was up is gone, or one did not come up again, with the cause; the next start is on its way."""


class EngineClient:
    """One engine process, restarted with backoff whenever it ends unasked.

    Beside it another one stands by, which has imported what it needs, but has no model yet: this halves the pause.
    Its thread starts the process, so that the kernel's parent-death signal is bound to a thread that lives as
    long as the client does.
    """

    def __init__(
        self, config: EngineConfig, events: EngineEvents, *, start_timeout: float, heartbeat_timeout: float
    ) -> None:
        self._config = config
        self._events = events
        self._start_timeout = start_timeout
        self._heartbeat_timeout = heartbeat_timeout
        self._send_lock = threading.Lock()
        self._connection: Connection | None = None  # set while the engine takes requests
        self._process: subprocess.Popen[bytes] | None = None
        self._standby: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._up_at = 0.0  # time.monotonic() when the engine came up
        self._heard_at = self._worked_at = 0.0  # likewise, when it last said something, and did something
        self._work: Work | None = None
        self._stopping = threading.Event()
        self._first_start_over = threading.Event()
        self._came_up = False  # at least once
        self._cause = "the engine is starting"
        self._thread = threading.Thread(target=self._supervise, name="engine-client", daemon=True)
        self.restarts = 0

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
    def cause(self) -> str:
        """Why none is available, while that is so."""
        return self._cause

    def silence(self) -> float:
        """Seconds since the engine that is up gave a sign of life, 0 if none is: a message, or for a while work.

        On a busy machine a step can take long. To be asked several times a second, for work shows only in between.
        """
        if not self._connection or not self._work:
            return 0.0
        now = time.monotonic()
        if self._work.went_on():
            self._worked_at = now
        silence = now - self._heard_at
        return silence if silence > LONGEST_WORK else now - max(self._heard_at, self._worked_at)

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
        """End the engine and the client's thread; at most about `STOP_TIMEOUT`."""
        self._stopping.set()
        with contextlib.suppress(EngineUnavailableError):
            self.send(Shutdown())
        self._thread.join()

    def _supervise(self) -> None:
        backoff = FIRST_BACKOFF
        while not self._stopping.is_set():
            started = time.monotonic()
            self._run_engine()
            if self._stopping.is_set():
                break
            if not self._came_up:
                break  # a first start that fails is for the operator, not for a retry
            if time.monotonic() - started > LONGEST_BACKOFF:
                backoff = FIRST_BACKOFF
            log.error("engine lost: %s; starting it again in %.1f s", self._cause, backoff)
            self._stopping.wait(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF)
            self.restarts += 1
        if self._standby:
            process, connection = self._standby
            process.kill()
            process.wait()
            connection.close()
        self._first_start_over.set()

    def _run_engine(self) -> None:
        """Run one engine process until it ends, by itself or by us, and keep why it ended."""
        if self._standby and self._standby[0].poll() is not None:
            self._standby[1].close()
            self._standby = None
        self._process, connection = self._standby or self._start_process()
        self._standby = None
        try:
            connection.send_bytes(encode(Begin()))
            cause = self._read_messages(connection)
        except (EOFError, OSError):
            cause = ""
        # First of all: a send to a stuck engine blocks, with the lock held, for as long as the engine is there.
        ended = self._end_process()
        with self._send_lock:
            self._connection = None
            self._cause = cause or ended
        connection.close()
        if self._came_up and not self._stopping.is_set():
            self._events.lost(self._cause)

    def _start_process(self) -> tuple[subprocess.Popen[bytes], Connection]:
        """An engine process that gets ready to begin."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [_python(), "-m", "tidewright.engine", str(theirs.fileno())]
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={**_MALLOC, **os.environ}
            )
        connection = Connection(ours.detach())
        with contextlib.suppress(OSError):  # it died already; reading will show it
            connection.send_bytes(encode(Configure(self._config)))
        return process, connection

    def _read_messages(self, connection: Connection) -> str:
        """Hand on what the engine says until a deadline passes or (EOFError) it is gone; return the cause."""
        deadline = time.monotonic() + self._start_timeout
        while True:
            is_up = self._connection is not None and time.monotonic() > self._up_at + STANDBY_DELAY
            if is_up and self._config.standby and not self._standby:
                self._standby = self._start_process()
            if not connection.poll(POLL_INTERVAL):
                if time.monotonic() > deadline:
                    return (
                        f"no heartbeat for {self._heartbeat_timeout:g} s"
                        if self._connection
                        else f"the model was not loaded within {self._start_timeout:g} s (start_timeout)"
                    )
                if self._stopping.is_set() and self._connection is None:
                    return "stopped while starting"
                continue
            message = decode_to_bridge(connection.recv_bytes())
            self._heard_at = time.monotonic()
            deadline = self._heard_at + self._heartbeat_timeout
            if isinstance(message, StepOutputs):
                self._events.outputs(message.outputs)
            elif isinstance(message, Heartbeat):
                self._events.stats(message.stats)
            elif isinstance(message, Failed):
                return message.message
            else:
                self._work = Work(message.pid)
                self._connection = connection
                self._up_at = time.monotonic()
                self._events.up(message)
                self._came_up = True
                self._first_start_over.set()
                log.info("engine %d ready: %d KV blocks on %s", message.pid, message.num_blocks, message.device)

    def _end_process(self) -> str:
        """Make sure that the process is gone; return how it ended."""
        assert self._process is not None
        try:
            # It may be about to exit by itself (crash, shutdown); its own exit code says more than our kill.
            code = self._process.wait(STOP_TIMEOUT if self._stopping.is_set() else 0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}, see its log above"


def _python() -> str:
    """The interpreter of this environment. Inside Triton's stub `sys.executable` may be the stub itself."""
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    for name in (f"{sys.prefix}/bin/python3", shutil.which("python3")):
        if name and Path(name).is_file():
            return name
    raise EngineStartError(f"no python3 found in {sys.prefix}/bin or on PATH to start the engine with")
