"""Runs the application in uvicorn, in one process or several on one port, with graceful shutdown."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tidewright import logs
from tidewright.parent_death import signal_on_parent_death
from tidewright_gateway.admission.limits import LimitServer
from tidewright_gateway.auth import AuthSetupError
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http import access_log, certificates
from tidewright_gateway.http.application import make_app
from tidewright_gateway.http.connection import PatientProtocol
from tidewright_gateway.websocket.server import uvicorn_options

# From the parent to its workers.
_PARENT, _SETTINGS, _LIMITS = (f"_TIDEWRIGHT_GATEWAY_{name}" for name in ("PARENT", "SETTINGS", "LIMITS"))
_METRICS = "PROMETHEUS_MULTIPROC_DIR"
_LONGEST_FOLDER = 60  # characters
_OTHER_FILES = 1000  # open files other than client connections
_LAST_WORDS = 2  # seconds after shutdown_grace in which clients get the reason
_WORKER_SILENCE = 30  # seconds until a worker that does not answer is replaced; some need more than 5 to start


class SetupError(Exception):
    """The settings name something that can't be used; the message says what."""


def serve(settings: GatewaySettings, announce: Callable[[str], None] | None = None) -> None:
    """Serves until Ctrl-C or SIGTERM. `announce` receives a text with address and replicas.

    Raises:
        SetupError: the port is taken, or the model, keys or the access log can't be read or written.
    """
    try:
        _prepare_process(settings)
        _check_port(settings.host, settings.port)
        app = make_app(
            settings, announce=announce
        )  # also for several workers, of which each would fail again and again
    except (AuthSetupError, OSError, ValueError) as error:
        raise SetupError(str(error)) from error
    if settings.workers == 1:
        server = uvicorn.Server(uvicorn.Config(app, **_options(settings)))
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has ended
            server.run()
        if not server.started:
            raise SetupError("the gateway could not start; see above")
        return
    if announce:
        announce(f"{settings.workers} workers listen on {settings.url}; {settings.url}/admin/status says more")
    with _short_folder() as folder:
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


def _check_port(host: str, port: int) -> None:
    """Raises SetupError: nobody can listen there."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        hint = "; choose another with --port" if error.errno == errno.EADDRINUSE else ""
        raise SetupError(f"{host}:{port}: {error.strerror}{hint}") from None


@contextmanager
def _short_folder() -> Iterator[str]:
    """A temporary folder for Unix sockets, whose paths are limited to about 100 characters: TMPDIR may be longer."""
    name = "tidewright-gateway-"
    where = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(prefix=name, dir=where if len(where) < _LONGEST_FOLDER else "/tmp") as folder:
        yield folder


def worker_app() -> ASGIApp:
    """The application of a worker process."""
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
        "proxy_headers": bool(settings.trusted_proxies),
        "forwarded_allow_ips": settings.trusted_proxies,
        "server_header": False,
        "ssl_certfile": settings.tls_cert or None,
        "ssl_keyfile": settings.tls_key or None,
        "ssl_context_factory": certificates.make_context if settings.tls_cert else None,
        "timeout_keep_alive": settings.keep_alive,
        # The pipeline ends requests after shutdown_grace, with the reason; this cuts what does not take it.
        "timeout_graceful_shutdown": math.ceil(settings.shutdown_grace) + _LAST_WORDS,
        "timeout_worker_healthcheck": _WORKER_SILENCE,
    }


def _prepare_process(settings: GatewaySettings) -> None:
    PatientProtocol.read_timeout, PatientProtocol.send_timeout = settings.read_timeout, settings.send_timeout
    PatientProtocol.max_connections = settings.max_connections
    _allow_files(settings.max_connections + _OTHER_FILES)
    try:
        logs.set_up("gateway", settings.log_format, settings.log_level, settings.log_file)
        access_log.write_to(settings.access_log, has_debug=settings.log_level == "debug")
    except logs.LogFileError as error:
        raise SetupError(str(error)) from None


def _allow_files(wanted: int) -> None:
    """Raises the limit of open files as far as allowed: each connection takes one, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _limit_server(socket_path: Path) -> Iterator[None]:
    """Limits of all workers, in a thread beside uvicorn's supervisor. Raises SetupError: there is no such socket."""
    loop, started = asyncio.new_event_loop(), threading.Event()
    stopped, trouble = asyncio.Event(), list[BaseException]()

    async def run() -> None:
        try:
            async with LimitServer(socket_path):
                started.set()
                await stopped.wait()
        except BaseException as error:
            trouble.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), name="limits", daemon=True)
    thread.start()
    started.wait()
    if trouble:
        raise SetupError(f"the workers' limits: {socket_path}: {trouble[0]}")
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()
