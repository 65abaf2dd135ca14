"""`tidewright serve`: settings from flags, environment and YAML; then Triton until Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from tidewright.config import CONFIG_FILE_VARIABLE, Settings, options_in_order
from tidewright.launch.errors import LaunchError
from tidewright.launch.export_command import is_export, prepare_fallback
from tidewright.launch.prepare import prepare
from tidewright.launch.server import TritonServer
from tidewright.launch.watchdog import Watchdog


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM. Not an Exception: nothing on the way may take it for a failure."""


class _StopSignals:
    """Ctrl-C and SIGTERM: the first interrupts whatever goes on, a further one only says "now"."""

    def __init__(self) -> None:
        self.hurry = threading.Event()
        self._first = True

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self._first:
            self._first = False
            raise _Stopped
        self.hurry.set()


def _settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One flag for each field of `Settings`; unset flags leave the word to environment and file."""
    for name, field in reversed(options_in_order()):
        flag = "--" + name.replace("_", "-")
        command = click.option(flag, name, default=None, help=f"{field.description}  [default: {field.default}]")(
            command
        )
    return command


@click.command()
@click.option("--config", type=click.Path(exists=True, dir_okay=False), help="YAML file with any of these options.")
@_settings_options
def serve(config: str | None, **flags: str | None) -> None:
    """Serve a model through Triton until Ctrl-C.

    Prepares the model if needed, starts tritonserver, and reports ready only after a first token has been
    generated through the whole chain. Every option is also an environment variable TIDEWRIGHT_<NAME> and a key
    of the YAML file; flags win over the environment, the environment over the file.

    \b
    Examples:
      tidewright serve
      tidewright serve --model ./my-model --dtype float32 --http-port 9000
      TIDEWRIGHT_KV_CACHE_MEMORY=4GiB tidewright serve --config serving.yaml
    """
    console = Console(stderr=True)
    if config:
        os.environ[CONFIG_FILE_VARIABLE] = config
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()]
        raise click.ClickException("; ".join(problems)) from None
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    sys.exit(_run(settings, console))


def _run(settings: Settings, console: Console) -> int:
    signals = _StopSignals()
    signals.install()
    server = None
    try:
        started = time.monotonic()
        model_dir = prepare(settings.model, console)
        if settings.fallback and not is_export(Path(settings.fallback)):
            source = settings.model if settings.fallback == "auto" else settings.fallback
            folder = prepare_fallback(settings.model, source, console, force=False)
            settings = settings.model_copy(update={"fallback": str(folder)})
        server = TritonServer(settings, model_dir)
        with console.status("Starting Triton and loading the model"):
            server.start()
            server.wait_ready()
        _print_welcome(console, server, time.monotonic() - started)
        if Watchdog(server, lambda message: console.print(f"[yellow]{escape(message)}[/]", soft_wrap=True)).run():
            raise _Stopped
        console.print(f"[red]tritonserver ended by itself with code {server.exit_code}[/]; see its log above")
        return server.exit_code or 1
    except LaunchError as error:
        console.print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except _Stopped:
        if server is not None and server.ready:
            grace = settings.shutdown_grace
            console.print(f"\nStopping. Running requests get up to {grace:g} s to finish; Ctrl-C again to stop now.")
            server.stop(grace, signals.hurry)
        return 0
    finally:
        if server is not None:
            server.kill()


def _print_welcome(console: Console, server: TritonServer, seconds: float) -> None:
    settings, url = server.settings, server.http_url
    console.print(f"[green]Ready[/] after {seconds:.1f} s: {settings.model}", highlight=False)
    console.print(
        f"  HTTP    {url}\n"
        f"  gRPC    {settings.host}:{settings.grpc_port}\n"
        f"  metrics http://{settings.host}:{settings.metrics_port}/metrics\n"
        "Try:\n"
        f"  curl -N {url}/v2/models/decoder/generate_stream -d "
        """'{"text_input": "The sea is", "stream": true, "max_tokens": 32}'\n"""
        "  tidewright chat\n"
        "Ctrl-C stops.",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
