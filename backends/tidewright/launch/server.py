"""Runs one tritonserver: starts it, waits until it really generates, and leaves nothing behind when it ends."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, get_args

import psutil

from tidewright.bridge.start_error import ERROR_FILE_VARIABLE
from tidewright.config import CONFIG_FILE_VARIABLE, Settings
from tidewright.launch.child_process import ChildProcess
from tidewright.launch.control import NoAnswerError, Question, UnreachableError, control, post
from tidewright.launch.errors import LaunchError
from tidewright.launch.leftovers import Leftovers, remove_those_of_the_dead
from tidewright.launch.model_chain import write_chain
from tidewright.launch.triton_install import assemble_backend_dir, find_triton, libpython_dirs
from tidewright.logs import LogHandler, LogLevel, open_handler
from tidewright.logs.relay import MAX_LINE, structured
from tidewright.memory.ledger import LEDGER_VARIABLE
from tidewright.schema import EMBED, EMBEDDING
from tidewright.served_models import ServedModel, chain_of, decoder_of, further_name
from tidewright.tracing.endpoint import traces_url

IDLE_FOR = 1.0  # seconds without a running request that count as idle; the figure lags by up to 0.25 s
ANSWER_TIME = 0.5  # seconds after the grace time in which the bridge ends what is left
KILL_AFTER = 2.0  # seconds from the end of the grace time, or from idle, to SIGKILL
END_TIMEOUT = 10.0  # seconds from SIGKILL until the kernel has ended a process, at most
REFUSED = " [invalid]"  # at the end of a decoder's error: the same request will never be accepted
FIRST_PATIENCE = 15.0  # seconds for the first answer of a server that starts; twice as many for each further one
_GRACE = 10.0  # seconds beyond start_timeout, within which the server itself says why it did not start
_TAIL_LINES = 20
_ACTIVE = re.compile(r"^tidewright_requests_active(?:\{[^}]*\})? (\S+)", re.MULTILINE)


ABORTS_AT_START = "boost::interprocess::lock_exception"
"""Triton's (2.51) last words in one of some thousand starts on a busy machine."""


class ServerStartError(LaunchError):
    """tritonserver did not come up; the message says why and what to change."""


class Stub(NamedTuple):
    """The Python process of a model."""

    process: psutil.Process
    region: str
    """Its shared memory, in /dev/shm."""


class TritonServer(ChildProcess):
    """One tritonserver with Tidewright's models, its stubs and its engine process.

    Used as: `start()`, `wait_ready()`, and in any case `stop()`.
    """

    def __init__(self, settings: Settings, model_dir: Path, log: LogHandler | None = None) -> None:
        """`log`: where the lines of tritonserver and of all below it go; None for standard error."""
        super().__init__()
        self._log = log or open_handler("")
        own = {"model": str(model_dir), "served_model_name": settings.model_name}
        self.settings = settings.model_copy(update=own)
        self.log_tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self.ready = False
        """It has generated a token, or computed an embedding."""
        self.asked_to_end = False
        self._first_alone = False
        self._pump: threading.Thread | None = None
        self._leftovers: Leftovers | None = None

    @property
    def http_url(self) -> str:
        return f"http://{reachable(self.settings.host)}:{self.settings.http_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{reachable(self.settings.host)}:{self.settings.metrics_port}/metrics"

    @property
    def models(self) -> set[str]:
        """Names of Triton's models that it loads at its start."""
        found = {folder.name for repository in _repositories() for folder in repository.iterdir() if folder.is_dir()}
        further = {name for one in self._loaded_too for name in chain_of(one.name)}
        return (found if self.settings.fallback else found - {"fallback"}) | further

    @property
    def _loaded_too(self) -> list[ServedModel]:
        """The models beside the first that Triton loads at its start."""
        return [] if self._first_alone else [one for one in self.settings.models if one.load]

    @property
    def models_with_engine(self) -> set[str]:
        """Those that take `control`, loaded or not."""
        return (self.models & {"decoder", "fallback"}) | {decoder_of(one.name) for one in self.settings.models}

    def embeds(self, model: str) -> bool:
        """Whether this decoder computes embeddings."""
        return self.settings.of(further_name(model) or self.settings.model_name).task == "embed"

    def start_again(self) -> None:
        """After it has ended by itself: to its first token. Raises LaunchError, as `start` and `wait_ready`.

        With the first model alone, as Triton would not start with another that does not load. The watchdog loads those.
        """
        self.kill()
        self.ready, self._first_alone = False, True
        self.start()
        self.wait_ready()

    def start(self) -> None:
        """Start tritonserver; returns at once.

        Raises:
            LaunchError: a port is taken, or there is no usable Triton.
        """
        for option in ("http_port", "grpc_port", "metrics_port"):
            check_port(self.settings.host, getattr(self.settings, option), option)
        install = find_triton()
        remove_those_of_the_dead()
        self._leftovers = leftovers = Leftovers()
        for one in self.settings.models:
            write_chain(one.name, _repositories(), self._further)
        command = self._command(install.binary, assemble_backend_dir(install, leftovers.folder / "backends"))
        self._launch(command, self._environment(), piped=True, inherited=[leftovers.lock.fileno()])
        self._pump = threading.Thread(target=self._pump_log, name="triton-log", daemon=True)
        self._pump.start()

    @property
    def _further(self) -> Path:
        """The repository of the models beside the first."""
        assert self._leftovers is not None
        return self._leftovers.folder / "models"

    @property
    def ledger(self) -> Path:
        """What memory/ledger.py writes for the models that this server loads. A new server has a new one."""
        assert self._leftovers is not None
        return self._leftovers.folder / "memory.json"

    def wait_ready(self) -> None:
        """Wait until each model has generated one token, or computed an embedding, through its whole chain.

        Once, a tritonserver that aborts by a known fault of its own is started again.

        Raises:
            ServerStartError: Triton ended, or the model can't be loaded, or start_timeout passed.
            LaunchError: as `start`.
        """
        deadline = time.monotonic() + self.settings.start_timeout + _GRACE
        self._wait_for("decoder", "generate", deadline)
        for one in self._loaded_too:
            _, decoder, generate = chain_of(one.name)
            self._wait_for(decoder, generate, deadline)
        self.ready = True

    def _wait_for(self, decoder: str, generate: str, deadline: float) -> None:
        """Wait for an answer of one model; `generate` is its chain."""
        has_aborted, embeds, patience = False, self.embeds(decoder), FIRST_PATIENCE
        url = f"{self.http_url}/v2/models/{decoder if embeds else generate}/generate"
        body: dict[str, Any] = {"text_input": "Hello"}
        body |= {EMBED.name: True} if embeds else {"max_tokens": 1, "temperature": 0.0}
        while time.monotonic() < deadline:
            if not self.running:
                why = self._why_it_ended()
                if has_aborted or self.asked_to_end or ABORTS_AT_START not in why:
                    raise ServerStartError(why)
                has_aborted = True
                self.kill()
                self.start()
                self.log_tail.append("serve: tritonserver aborted while it started; starting it again\n")
                continue
            try:
                answer = json.loads(post(url, body, patience))
                if EMBEDDING.name in answer or answer.get("served_by") == "decoder":
                    return
                if decoder != "decoder" and "text_output" in answer:
                    return
            except NoAnswerError as error:  # a model may be that slow, but a request that was lost never ends
                self.log_tail.append(f"serve: {error}; asking again\n")
                patience *= 2
            except LaunchError as error:
                if str(error).endswith(REFUSED):
                    raise ServerStartError(f"the server refuses even 'Hello' and one token: {error}") from None
                # Else not yet.
            time.sleep(0.05)
        what = "embedding was computed" if embeds else "token was generated"
        what += "" if decoder == "decoder" else f" by {decoder}"
        limit = f"{self.settings.start_timeout:g} s (start_timeout)"
        raise ServerStartError(f"no {what} within {limit}; the last lines of the log:\n{''.join(self.log_tail)}")

    def drain(self) -> None:
        """Ask Triton to end: it takes no new requests, running ones may finish, and get an answer if they can't."""
        self.asked_to_end = True
        if not self.running:
            return
        for model in self.models_with_engine:
            with contextlib.suppress(LaunchError):  # no answer is needed from one that is not well
                control(self.http_url, "drain", 1, model)
        if self.running:
            os.kill(self._process.pid, signal.SIGTERM)  # type: ignore[union-attr]

    def stop(self, grace: float = 0.0, hurry: threading.Event | None = None) -> None:
        """End everything within about `grace` + `KILL_AFTER` seconds; sooner when no request is running.

        What is not done after `settings.shutdown_grace` is answered with the reason. Setting `hurry` ends the wait.
        """
        hurry = hurry or threading.Event()
        self.drain()
        now = idle_since = time.monotonic()
        deadline = now + grace + (ANSWER_TIME if grace else 0)
        while self.running and now < deadline and now - idle_since < IDLE_FOR and not hurry.is_set():
            hurry.wait(0.1)
            now = time.monotonic()
            if self._busy():
                idle_since = now
        deadline = time.monotonic() + KILL_AFTER
        while self.running and time.monotonic() < deadline and not hurry.is_set():
            hurry.wait(0.05)
        self.kill()

    def kill(self) -> None:
        """End everything now, whatever state it is in, and remove its traces."""
        if self._process is not None:
            for process in self._session_processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT)
            psutil.wait_procs(self._session_processes(), timeout=2)
            if self._pump is not None:
                self._pump.join(timeout=1)
        if self._leftovers is not None:
            self._leftovers.remove()
            self._leftovers = None

    def stub(self, model: str) -> Stub | None:
        """The Python process of a model, if it lives."""
        for process in self._session_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                if command and command[0].endswith("triton_python_backend_stub") and f"/{model}/" in command[1]:
                    return Stub(process, command[2])
        return None

    def remove_region(self, name: str) -> None:
        """The shared memory of a stub that is gone, once its model is loaded again: Triton leaves it."""
        if self._leftovers is not None:
            self._leftovers.remove_region(name)

    def _command(self, binary: Path, backends: Path) -> list[str]:
        assert self._leftovers is not None
        settings, repositories = self.settings, _repositories()
        if settings.models:
            repositories.append(self._further)
        shown = get_args(LogLevel).index(settings.log_level)  # what Triton calls info is for debugging
        return [
            str(binary),
            f"--backend-directory={backends}",
            *(f"--model-repository={folder}" for folder in repositories),
            # Explicit, so that a model can be unloaded and loaded again.
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in sorted(self.models)),
            "--disable-auto-complete-config",
            f"--http-address={settings.host}",
            f"--http-port={settings.http_port}",
            f"--grpc-address={settings.host}",
            f"--grpc-port={settings.grpc_port}",
            f"--metrics-address={settings.host}",
            f"--metrics-port={settings.metrics_port}",
            "--metrics-interval-ms=500",
            f"--exit-timeout-secs={math.ceil(settings.shutdown_grace + ANSWER_TIME + 1)}",
            f"--backend-config=python,shm-region-prefix-name={self._leftovers.region_prefix}",
            f"--log-info={int(shown == 0)}",
            f"--log-warning={int(shown <= 2)}",
            *self._tracing(),
        ]

    def _tracing(self) -> list[str]:
        """Triton records what comes with a trace context, and nothing by itself: callers sample."""
        endpoint = self.settings.otlp_endpoint
        if not endpoint.startswith("http"):
            return []
        settings = (
            "mode=opentelemetry",
            "rate=0",
            "level=TIMESTAMPS",
            f"opentelemetry,url={traces_url(endpoint)}",
            "opentelemetry,resource=service.name=tidewright-triton",
        )
        return [f"--trace-config={setting}" for setting in settings]

    def _environment(self) -> dict[str, str]:
        """The stubs must find this Python environment, libpython and the settings."""
        environment = {**os.environ, **self.settings.as_environment()}
        environment.pop(CONFIG_FILE_VARIABLE, None)  # its values are in the settings already
        environment[ERROR_FILE_VARIABLE] = str(self._start_error)
        environment[LEDGER_VARIABLE] = str(self.ledger)
        environment["PATH"] = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{environment.get('PATH', os.defpath)}"
        if sys.prefix != sys.base_prefix:
            environment["VIRTUAL_ENV"] = sys.prefix
        libraries = [*libpython_dirs(), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
        return environment

    def _pump_log(self) -> None:
        """Keep the last lines of Triton's log, and pass them on: to a terminal, once it is up."""
        settings = self.settings
        is_json, pid = settings.log_format == "json", self.pid or 0
        always = is_json or settings.log_file or settings.log_level == "debug"
        assert self._process is not None
        assert self._process.stdout is not None
        output = self._process.stdout
        # Whoever reads our log may be gone; if nobody emptied this pipe, Triton would wait for ever.
        for line in iter(lambda: output.readline(MAX_LINE), b""):
            text = line.decode(errors="replace").rstrip("\r\n")
            self.log_tail.append(f"{text}\n")
            if self.ready or always:
                self._log.write_line(structured(text, pid) if is_json else text)

    @property
    def _start_error(self) -> Path:
        """A file in which a stub says why it can't start."""
        assert self._leftovers is not None
        return self._leftovers.folder / "start_error"

    def _why_it_ended(self) -> str:
        if self._start_error.is_file():
            return self._start_error.read_text(encoding="utf-8").strip()
        assert self._pump is not None
        self._pump.join(timeout=1)
        return f"tritonserver ended with code {self.exit_code}; its last lines:\n{''.join(self.log_tail)}"

    def _busy(self) -> bool:
        """Requests are in flight, as the bridge counts them."""
        try:
            text = Question(self.metrics_url, timeout=1).answer(timeout=1).decode()
        except UnreachableError:
            return False
        except LaunchError:
            return True  # too loaded to say
        return any(float(count) > 0 for count in _ACTIVE.findall(text))

    def _session_processes(self) -> list[psutil.Process]:
        """tritonserver and all that came of it: they share the session that it leads."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                pass
        return found


def _repositories() -> list[Path]:
    """`model_repository/` and `ensemble/`: in an installed package beside it, else in the checkout."""
    package = Path(__file__).resolve().parent.parent
    root = package / "share"
    if not root.is_dir():
        root = package.parent.parent
    return [root / "model_repository", root / "ensemble"]


def check_port(host: str, port: int, option: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            flag = "--" + option.replace("_", "-")
            raise ServerStartError(f"can't listen on {host}:{port} ({error.strerror}); choose another {flag}") from None


def reachable(host: str) -> str:
    """An address to call a server on that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host
