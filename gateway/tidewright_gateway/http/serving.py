"""Runs the application in uvicorn, in one process or several on one port, and ends it gently."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tidewright.parent_death import signal_on_parent_death
from tidewright_gateway.admission.limits import LimitServer
from tidewright_gateway.auth import AuthSetupError
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http import access_log
from tidewright_gateway.http.application import make_app
from tidewright_gateway.http.connection import PatientProtocol
from tidewright_gateway.websocket.server import uvicorn_options

# From the parent to its workers.
_PARENT, _SETTINGS, _LIMITS = (f"_TIDEWRIGHT_GATEWAY_{name}" for name in ("PARENT", "SETTINGS", "LIMITS"))
_METRICS = "PROMETHEUS_MULTIPROC_DIR"


class SetupError(Exception):
    """The settings name something that can't be used; the message says what."""


def serve(settings: GatewaySettings) -> None:
    """Until Ctrl-C or SIGTERM.

    Raises:
        SetupError: the model, keys or the access log can't be read or written.
    """
    try:
        _prepare_process(settings)
        app = make_app(settings)  # also with several workers, each of which would only fail again and again
    except (AuthSetupError, OSError, ValueError) as error:
        raise SetupError(str(error)) from error
    if settings.workers == 1:
        uvicorn.run(app, **_options(settings))
        return
    with tempfile.TemporaryDirectory(prefix="tidewright-gateway-") as folder:
        limits, metrics = Path(folder, "limits"), Path(folder, "metrics")
        metrics.mkdir()
        os.environ.update(
            {
                _PARENT: str(os.getpid()),
                _SETTINGS: settings.model_dump_json(),
                _LIMITS: str(limits),
                _METRICS: str(metrics),
            }
        )
        with _limit_server(limits):
            uvicorn.run(f"{__name__}:worker_app", factory=True, workers=settings.workers, **_options(settings))


def worker_app() -> ASGIApp:
    """In a worker, which uvicorn starts again when it ends."""
    signal_on_parent_death(signal.SIGTERM)
    if os.getppid() != int(os.environ[_PARENT]):
        sys.exit("the gateway ended while this worker began")
    settings = GatewaySettings.model_validate_json(os.environ[_SETTINGS])
    _prepare_process(settings)
    return make_app(settings, Path(os.environ[_LIMITS]))


def _options(settings: GatewaySettings) -> dict[str, Any]:
    return {
        "host": settings.host,
        "port": settings.port,
        "loop": "uvloop",
        "http": PatientProtocol,
        **uvicorn_options(settings),
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "ssl_certfile": settings.tls_cert or None,
        "ssl_keyfile": settings.tls_key or None,
        "timeout_graceful_shutdown": max(1, round(settings.shutdown_grace)),
    }


def _prepare_process(settings: GatewaySettings) -> None:
    PatientProtocol.read_timeout, PatientProtocol.send_timeout = settings.read_timeout, settings.send_timeout
    access_log.write_to(settings.access_log)
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


@contextmanager
def _limit_server(socket: Path) -> Iterator[None]:
    """Limits of all workers, in a thread beside uvicorn's supervisor."""
    loop, started = asyncio.new_event_loop(), threading.Event()
    stopped = asyncio.Event()

    async def run() -> None:
        async with LimitServer(socket):
            started.set()
            await stopped.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), name="limits", daemon=True)
    thread.start()
    started.wait()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()
