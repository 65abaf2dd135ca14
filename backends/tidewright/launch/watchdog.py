"""Watches a server from outside, for what nobody inside can see: a dead or stuck stub, or Triton itself gone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from tidewright.launch.control import (
    DeadStubError,
    NoAnswerError,
    TroubleError,
    UnreachableError,
    control,
    post,
    probe_tokenizer,
)
from tidewright.launch.errors import LaunchError
from tidewright.launch.gateway_process import GatewayProcess
from tidewright.launch.server import TritonServer
from tidewright.schema import DRAINING

PROBE_INTERVAL = 1.0  # seconds
PROBE_TIMEOUT = 5.0  # seconds
PATIENCE = 3  # probes in a row without an answer; then the stub is taken for stuck
RELOAD_INTERVAL = 5.0  # seconds between attempts to load a model that would not load
MAX_RESTARTS = 3  # of Triton, within RESTART_WINDOW; whoever started us may know better than to try once more
RESTART_WINDOW = 600.0  # seconds


class Watchdog:
    def __init__(self, server: TritonServer, gateway: GatewayProcess | None, say: Callable[[str], None]) -> None:
        self._server, self._gateway, self._say = server, gateway, say
        self._silent = dict.fromkeys(("tokenizer", "failsafe", *server.models_with_engine), 0)
        self._missing: dict[str, float] = {}  # models to be loaded again, and when (time.monotonic())
        self._restarts: deque[float] = deque(maxlen=MAX_RESTARTS)  # when (time.monotonic())

    def run(self) -> bool:
        """Until Triton ends and stays so (False), or someone has asked for a drain (True)."""
        while self._server.running or self._start_again():
            for model in self._silent:
                if self._probe(model):
                    return True
            if self._gateway and not self._gateway.running:
                self._say(f"the gateway ended with code {self._gateway.exit_code}; starting it again")
                self._gateway.start()
            time.sleep(PROBE_INTERVAL)
        return False

    def _start_again(self) -> bool:
        """Triton aborts by itself when, for one, a stub is killed while it holds a lock of their shared memory."""
        if self._server.asked_to_end:
            return False
        began = time.monotonic()
        if len(self._restarts) == MAX_RESTARTS and began - self._restarts[0] < RESTART_WINDOW:
            return False
        self._restarts.append(began)
        self._say(
            f"tritonserver ended by itself with code {self._server.exit_code}; its requests are lost; starting it again"
        )
        try:
            self._server.start_again()
        except LaunchError as error:
            self._say(f"tritonserver could not be started again: {error}")
            return False
        self._missing.clear()
        self._silent = dict.fromkeys(self._silent, 0)
        self._say(f"tritonserver is back after {time.monotonic() - began:.1f} s")
        return True

    def _probe(self, model: str) -> bool:
        """True if the server drains."""
        if model in self._missing:
            self._load(model)
            return False
        try:
            if model == "tokenizer":
                probe_tokenizer(self._server.http_url, PROBE_TIMEOUT)
            else:
                control(self._server.http_url, "health", PROBE_TIMEOUT, model)
        except DeadStubError:
            self._reload(model, "died")
        except NoAnswerError:
            self._silent[model] += 1
            if self._silent[model] == PATIENCE:
                self._reload(model, "does not answer")
            return False
        except TroubleError as error:
            # An engine that is down comes up again by itself.
            return model == "decoder" and str(error) == DRAINING
        except UnreachableError:
            return False  # it is about to end
        self._silent[model] = 0
        return False

    def _reload(self, model: str, what: str) -> None:
        self._say(f"the stub of {model} {what}; requests in it are lost; loading the model again")
        self._server.kill_stub(model)
        try:
            post(f"{self._server.http_url}/v2/repository/models/{model}/unload", {}, PROBE_TIMEOUT)
        except LaunchError as error:
            self._say(f"{model} could not be unloaded: {error}")
        self._missing[model] = 0.0
        self._load(model)

    def _load(self, model: str) -> None:
        began = time.monotonic()
        if began < self._missing[model]:
            return
        timeout = self._server.settings.start_timeout + 10
        try:
            post(f"{self._server.http_url}/v2/repository/models/{model}/load", {}, timeout)
        except LaunchError as error:
            self._say(f"{model} could not be loaded again: {error}; trying again in {RELOAD_INTERVAL:g} s")
            self._missing[model] = time.monotonic() + RELOAD_INTERVAL
            return
        del self._missing[model]
        self._say(f"{model} is back after {time.monotonic() - began:.1f} s")
