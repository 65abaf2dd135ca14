"""The gateway that `tidewright serve` runs beside its Triton, in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tidewright.config import Settings
from tidewright.launch.child_process import ChildProcess
from tidewright.launch.control import Question
from tidewright.launch.errors import LaunchError
from tidewright.launch.server import END_TIMEOUT, check_port, reachable
from tidewright.served_models import smaller_name

HOST = "127.0.0.1"
START_TIMEOUT = 30.0  # seconds
STOP_TIMEOUT = 2.0  # seconds
GRACE_MARGIN = 1.0
"""Seconds that its requests get beyond the server's `shutdown_grace`, so that the engine's last word reaches clients.

Shorter than STOP_TIMEOUT: what still waits then, such as for another replica, ends with the gateway's own reason.
"""


class GatewayProcess(ChildProcess):
    def __init__(self, settings: Settings, model_dir: Path) -> None:
        """Raises LaunchError: its port is taken, or it is not installed."""
        super().__init__()
        if importlib.util.find_spec("fastapi") is None:
            raise LaunchError("the gateway needs: pip install 'tidewright[gateway]'; or do without: --gateway-port 0")
        check_port(HOST, settings.gateway_port, "gateway_port")
        self.url = f"http://{HOST}:{settings.gateway_port}"
        named = settings.served_model_name or os.environ.get("TIDEWRIGHT_GATEWAY_SERVED_MODEL_NAME")
        self.model_name = named or settings.model_name
        self._environment = {
            **os.environ,
            "TIDEWRIGHT_GATEWAY_MODEL": str(model_dir),
            "TIDEWRIGHT_GATEWAY_SERVED_MODEL_NAME": self.model_name,
            "TIDEWRIGHT_GATEWAY_MODELS": json.dumps([f"{one.name}={one.model}" for one in settings.models]),
            "TIDEWRIGHT_GATEWAY_SMALLER_MODEL": smaller_name(settings.model_name) if settings.smaller_variant else "",
            "TIDEWRIGHT_GATEWAY_HOST": HOST,
            "TIDEWRIGHT_GATEWAY_PORT": str(settings.gateway_port),
            "TIDEWRIGHT_GATEWAY_TLS_CERT": "",  # nobody else sees what stays on this machine
            "TIDEWRIGHT_GATEWAY_TLS_KEY": "",
            "TIDEWRIGHT_GATEWAY_REPLICAS": f"{reachable(settings.host)}:{settings.grpc_port}",
            "TIDEWRIGHT_GATEWAY_FALLBACK": str(bool(settings.fallback)),
            "TIDEWRIGHT_GATEWAY_SHUTDOWN_GRACE": str(settings.shutdown_grace + GRACE_MARGIN),
            "TIDEWRIGHT_GATEWAY_LOG_LEVEL": settings.log_level,
            "TIDEWRIGHT_GATEWAY_LOG_FORMAT": settings.log_format,
            "TIDEWRIGHT_GATEWAY_LOG_FILE": settings.log_file,
        }
        if settings.otlp_endpoint:
            self._environment.setdefault("TIDEWRIGHT_GATEWAY_OTLP_ENDPOINT", settings.otlp_endpoint)

    def start(self) -> None:
        self._launch([sys.executable, "-m", "tidewright_gateway"], self._environment)

    def wait_ready(self) -> None:
        """Raises LaunchError: it ended, or finds no replica."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if not self.running:
                raise LaunchError(f"the gateway ended with code {self.exit_code}; see its log above")
            with contextlib.suppress(LaunchError):
                Question(f"{self.url}/health/ready").answer(timeout=5)
                return
            time.sleep(0.05)
        raise LaunchError(f"the gateway was not ready within {START_TIMEOUT:g} s")

    def drain(self) -> None:
        """No new requests; those that run may end."""
        if self._process and self.running:
            self._process.send_signal(signal.SIGTERM)

    def wait_drained(self, until: float, hurry: threading.Event) -> None:
        """Until its requests have ended: those that wait for the server that is gone get their answer, too.

        At most to the time `until` (time.monotonic()), or until `hurry` is set.
        """
        while self.running and time.monotonic() < until and not hurry.is_set():
            hurry.wait(0.05)

    def stop(self) -> None:
        """Ends it, however it is."""
        if self._process is None:
            return
        self.drain()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT)
