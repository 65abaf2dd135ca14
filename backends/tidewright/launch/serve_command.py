"""`tidewright serve`: settings from flags, environment and YAML; then Triton until Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import click
from pydantic import ValidationError
from pydantic_core import PydanticUndefined
from rich.console import Console

from tidewright.config import CONFIG_FILE_VARIABLE, Settings
from tidewright.launch.errors import LaunchError
from tidewright.launch.prepare import prepare
from tidewright.launch.server import TritonServer


class _Stopped(Exception):  # noqa: N818 - not an error: Ctrl-C or SIGTERM asked for it
    pass


def _settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One flag for each field of `Settings`; unset flags leave the word to environment and file."""
    for name, field in reversed(Settings.model_fields.items()):
        default = "" if field.default is PydanticUndefined else f"  [default: {field.default}]"
        flag = "--" + name.replace("_", "-")
        command = click.option(flag, name, default=None, help=f"{field.description}{default}")(command)
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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_stopped)
    server = None
    try:
        started = time.monotonic()
        model_dir = prepare(settings.model, console)
        server = TritonServer(settings, model_dir)
        with console.status("Starting Triton and loading the model"):
            server.start()
            server.wait_ready()
        _print_welcome(console, server, time.monotonic() - started)
        code = server.wait()
        console.print(f"[red]tritonserver ended by itself with code {code}[/]; see its log above")
        return code or 1
    except LaunchError as error:
        console.print(f"[red]Error:[/] {error}", highlight=False, markup=True, soft_wrap=True)
        return 1
    except _Stopped:
        return _shut_down(server, settings, console)
    finally:
        # From here on nothing may interrupt the clean-up; it is short.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if server is not None:
            server.kill()


def _shut_down(server: TritonServer | None, settings: Settings, console: Console) -> int:
    if server is None:
        return 130
    console.print(
        f"\nStopping: running requests may finish for up to {settings.shutdown_grace:g} s; Ctrl-C again to stop now"
    )
    try:
        server.stop(settings.shutdown_grace)
    except _Stopped:
        pass  # asked twice: the caller's clean-up kills what is left
    return 0


def _raise_stopped(number: int, frame: types.FrameType | None) -> None:
    raise _Stopped


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
