"""Faults of Triton 2.51 and its client library that a test can meet, by name.

A test that accepts one still asserts what Tidewright promises: each request ends once, and the server comes back.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from helpers.otlp import ReceivedSpan
from helpers.triton import RunningServer

ABORTED = f"tritonserver ended by itself with code {-signal.SIGABRT}"
"""What the watchdog says then."""

MAY_STAY_UNLOADING = {"decoder"}
"""A model whose stub was killed with requests in it: Triton waits for their responses, which nobody sends any more."""

CLIENT_HANGS = "Timeout ("
"""How faulthandler begins when tritonclient waits in close() for a stream that the server has ended."""


def aborted(server: RunningServer) -> bool:
    """A stub that is killed while it holds a lock of the shared memory makes tritonserver abort (lock_exception)."""
    return _ended_by(server, signal.SIGABRT)


def unless_aborted(server: RunningServer, what: Callable[[], None]) -> None:
    """Does it, and if tritonserver aborts meanwhile, once more with a new one."""
    try:
        what()
    except Exception:
        if not aborted(server):
            raise
        server.revive()
        what()


def crashed(server: RunningServer) -> bool:
    """Streams with the header `triton_grpc_error` can crash tritonserver: it writes to one that has just ended."""
    return _ended_by(server, signal.SIGSEGV)


def _ended_by(server: RunningServer, number: signal.Signals) -> bool:
    """Clients see their connection break before the process has ended."""
    deadline = time.monotonic() + 3
    while server.triton.running and time.monotonic() < deadline:
        time.sleep(0.05)
    return server.triton.exit_code == -number


def untraced(spans: list[ReceivedSpan]) -> bool:
    """Of some hundred gRPC streams with a trace context Triton records one not at all, as if it had come without."""
    attempts = {span.span_id for span in spans if span.name == "attempt"}
    return any(span.parent_id in attempts for span in spans if span.name == "bridge")
