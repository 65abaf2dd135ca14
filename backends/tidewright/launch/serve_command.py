"""`tidewright serve`: settings from flags, environment and YAML; then Triton until Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from tidewright.config import CONFIG_FILE_VARIABLE, Settings
from tidewright.launch.client_commands import DEFAULT_URL
from tidewright.launch.errors import LaunchError
from tidewright.launch.export_command import is_export, prepare_fallback
from tidewright.launch.gateway_process import GatewayProcess
from tidewright.launch.options import settings_from, settings_options
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


@click.command()
@click.option("--config", type=click.Path(), help="YAML file with any of these options.")
@settings_options(Settings)
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
    sys.exit(_run(settings_from(Settings, flags), console))


def _run(settings: Settings, console: Console) -> int:
    signals = _StopSignals()
    signals.install()
    server: TritonServer | None = None
    gateway: GatewayProcess | None = None
    try:
        started = time.monotonic()
        model_dir = prepare(settings.model, console)
        if settings.fallback and not is_export(Path(settings.fallback)):
            source = settings.model if settings.fallback == "auto" else settings.fallback
            folder = prepare_fallback(settings.model, source, console, force=False)
            settings = settings.model_copy(update={"fallback": str(folder)})
        if settings.gateway_port:
            gateway = GatewayProcess(settings, model_dir)
        server = TritonServer(settings, model_dir)
        with console.status("Starting Triton and loading the model"):
            server.start()
            server.wait_ready()
            if gateway:
                gateway.start()
                gateway.wait_ready()
        _print_welcome(console, server, gateway, time.monotonic() - started)
        if Watchdog(server, gateway, lambda text: console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)).run():
            raise _Stopped
        console.print("[red]tritonserver does not stay well[/]; see its log above")
        return server.exit_code or 1
    except LaunchError as error:
        console.print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except _Stopped:
        if server is not None and server.ready:
            grace = settings.shutdown_grace
            console.print(f"\nStopping. Running requests get up to {grace:g} s to finish; Ctrl-C again to stop now.")
            if gateway:
                gateway.drain()
            server.stop(grace, signals.hurry)
        return 0
    finally:
        if gateway is not None:
            gateway.stop()
        if server is not None:
            server.kill()


def _print_welcome(console: Console, server: TritonServer, gateway: GatewayProcess | None, seconds: float) -> None:
    settings, url = server.settings, server.http_url
    embeds, talk = settings.task == "embed", ""
    if gateway and embeds:
        body = f'{{"model": "{gateway.model_name}", "input": "Hello"}}'
        talk = f"  curl {gateway.url}/v1/embeddings -H 'Content-Type: application/json' -d '{body}'\n"
    elif gateway:
        body = f'{{"model": "{gateway.model_name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        talk = f"  curl {gateway.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n"
    console.print(f"[green]Ready[/] after {seconds:.1f} s: {settings.model}", highlight=False)
    console.print(
        (
            f"  gateway {gateway.url}/v1 (OpenAI's API, model {gateway.model_name}); to read: {gateway.url}/docs\n"
            + ("" if embeds else f"  chat    {gateway.url}/\n")
            if gateway
            else ""
        )
        + f"  HTTP    {url}\n"
        f"  gRPC    {settings.host}:{settings.grpc_port}\n"
        f"  metrics http://{settings.host}:{settings.metrics_port}/metrics\n"
        "Try:\n"
        f"{talk}{_examples(url, embeds)}Ctrl-C stops.",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _examples(url: str, embeds: bool) -> str:
    if embeds:
        return f"  curl {url}/v2/models/decoder/generate -d " + """'{"text_input": "Hello", "embed": true}'\n"""
    return (
        f"  curl -N {url}/v2/models/decoder/generate_stream -d "
        """'{"text_input": "The sea is", "stream": true, "max_tokens": 32}'\n"""
        f"  tidewright chat{'' if url == DEFAULT_URL else f' --url {url}'}\n"
    )
