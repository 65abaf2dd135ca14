"""An engine's process with a connection to it: started, standing by for another, and ended for certain."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tidewright.engine.messages import Configure, EngineConfig, encode
from tidewright.logs import event

log = logging.getLogger(__name__)

KILL_TIMEOUT = 10.0  # seconds from SIGKILL to the end of a process that works
STANDBY_DELAY = 3.0  # seconds that an engine is up before the next one gets ready to replace it
STANDBY_RETRY = 60.0  # seconds until the next try to start one that could not be started, or that died

# A step's large tensors come and go: kept memory saves the page faults (a tenth of a long prefill's time on a CPU), and
# huge pages save some more. glibc reads this at the start of a process only; other C libraries ignore it.
_MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"
    ":glibc.malloc.hugetlb=1"
}


class EngineStartError(RuntimeError):
    """The engine did not start; the message is its own."""


class EngineProcess:
    """It gets ready to begin. The kernel ends it with the thread that made it."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises EngineStartError."""
        python = _python()
        try:
            ours, theirs = socket.socketpair()
            with contextlib.ExitStack() as stack:
                stack.enter_context(theirs)
                stack.callback(ours.close)
                command = [python, "-m", "tidewright.engine", str(theirs.fileno())]
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={**_MALLOC, **os.environ}
                )
                self.connection = Connection(ours.detach())
        except OSError as error:
            raise EngineStartError(f"the engine's process could not be started: {error}") from None
        with contextlib.suppress(OSError):  # it died already; reading will show it
            self.connection.send_bytes(encode(Configure(config)))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self, patience: float) -> str:
        """Makes sure that it is gone, `patience` seconds from now or before; how it ended."""
        # It may be about to exit by itself (crash, shutdown); its own exit code says more than our kill.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        code = self._process.returncode if self._process.returncode is not None else self.kill()
        if code is None:
            return "it does not end"
        return f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}, see its log above"

    def kill(self) -> int | None:
        """Its exit code. One that the kernel does not let go, as in a call of a broken driver, is left alone: None."""
        self._process.kill()
        try:
            return self._process.wait(KILL_TIMEOUT)
        except subprocess.TimeoutExpired:
            log.error(
                "engine process %d has not ended %g s after SIGKILL; it is left to itself", self.pid, KILL_TIMEOUT
            )
            return None


class Standby:
    """A process that stands by for the next engine. It is a convenience: one that can't be started is tried again."""

    def __init__(self) -> None:
        self.process: EngineProcess | None = None
        self._next = 0.0  # time.monotonic() from when on one may be started

    def engine_up(self) -> None:
        """The one before needs the processor for itself a little longer."""
        self._next = max(self._next, time.monotonic() + STANDBY_DELAY)

    def take(self) -> EngineProcess | None:
        """The one that is ready, if there is one."""
        process, self.process = self.process, None
        if process and process.has_ended:
            process.connection.close()
            return None
        return process

    def keep(self, config: EngineConfig) -> None:
        """Sees to it that there is one; to be called now and then."""
        now = time.monotonic()
        if now < self._next or (self.process and not self.process.has_ended):
            return
        self._next = now + STANDBY_RETRY
        self.drop()
        try:
            self.process = EngineProcess(config)
        except EngineStartError as error:
            extra = event("engine_start_failed")
            log.warning("no engine can stand by: %s; trying again in %g s", error, STANDBY_RETRY, extra=extra)

    def drop(self) -> None:
        process, self.process = self.process, None
        if process:
            process.kill()
            process.connection.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _python() -> str:
    """The interpreter of this environment. Inside Triton's stub `sys.executable` may be the stub itself."""
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    for name in (f"{sys.prefix}/bin/python3", shutil.which("python3")):
        if name and Path(name).is_file():
            return name
    raise EngineStartError(f"no python3 found in {sys.prefix}/bin or on PATH to start the engine with")
