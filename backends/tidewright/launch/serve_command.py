"""`tidewright serve`: settings from flags, environment and YAML; then Triton until Ctrl-C."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
import time
import types
from pathlib import Path

import click
from rich.markup import escape

from tidewright.config import CONFIG_FILE_VARIABLE, Settings
from tidewright.config_file import as_file
from tidewright.distributed.secret import SecretFileError, rendezvous_secret
from tidewright.engine.messages import parse_rendezvous
from tidewright.launch.client_commands import DEFAULT_URL
from tidewright.launch.errors import LaunchError
from tidewright.launch.export_command import is_export, prepare_fallback
from tidewright.launch.gateway_process import GRACE_MARGIN, GatewayProcess
from tidewright.launch.options import settings_from, settings_options
from tidewright.launch.prepare import prepare
from tidewright.launch.server import TritonServer
from tidewright.launch.terminal import Terminal
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
@click.option("--print-config", is_flag=True, help="Print all options as such a file, and end.")
@settings_options(Settings)
def serve(config: str | None, print_config: bool, **flags: str | None) -> None:
    """Serve a model, or several, through Triton until Ctrl-C.

    Prepares the model if needed, starts tritonserver, and reports ready only after a first token has been
    generated through the whole chain. Every option is also an environment variable TIDEWRIGHT_<NAME> and a key
    of the YAML file; flags win over the environment, the environment over the file.

    --model may be given several times. Each model has an engine of its own; requests to the gateway name theirs.

    \b
    Examples:
      tidewright serve
      tidewright serve --model ./my-model --dtype float32 --http-port 9000
      tidewright serve --model smollm2-135m --model small=./my-model
      TIDEWRIGHT_KV_CACHE_MEMORY=4GiB tidewright serve --config serving.yaml
    """
    if config:
        os.environ[CONFIG_FILE_VARIABLE] = config
    settings = settings_from(Settings, flags)
    if print_config:
        click.echo(as_file(settings.model_dump()), nl=False)
        return
    try:
        terminal = Terminal("serve", settings.log_format, settings.log_level, settings.log_file)
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    sys.exit(_run(settings, terminal))


def _run(settings: Settings, terminal: Terminal) -> int:
    signals = _StopSignals()
    signals.install()
    server: TritonServer | None = None
    gateway: GatewayProcess | None = None
    console = terminal.console
    try:
        started = time.monotonic()
        host = parse_rendezvous(settings.rendezvous)[0] if settings.rendezvous else "localhost"
        rendezvous_secret(settings.rendezvous_secret_file, host)  # the engine does so again; a mistake shows at once
        _check_adapter_folders(settings)
        model_dir = prepare(settings.model, console)
        further = [one.model_copy(update={"model": str(prepare(one.model, console))}) for one in settings.models]
        settings = settings.model_copy(update={"models": further})
        if settings.fallback and not is_export(Path(settings.fallback)):
            source = settings.model if settings.fallback == "auto" else settings.fallback
            folder = prepare_fallback(settings.model, source, console, force=False)
            settings = settings.model_copy(update={"fallback": str(folder)})
        if settings.gateway_port:
            gateway = GatewayProcess(settings, model_dir)
        server = TritonServer(settings, model_dir, terminal.handler)
        with console.status("Starting Triton and loading the model"):
            server.start()
            server.wait_ready()
            if gateway:
                gateway.start()
                gateway.wait_ready()
        _welcome(terminal, server, gateway, time.monotonic() - started)
        told = (lambda text: terminal.warn(text, "watchdog"), lambda text: terminal.say(text, "watchdog"))
        if Watchdog(server, gateway, *told).run():
            raise _Stopped
        text = "tritonserver does not stay well; see its log above"
        terminal.fail(text, "gave_up", markup="[red]tritonserver does not stay well[/]; see its log above")
        return server.exit_code or 1
    except (LaunchError, SecretFileError) as error:
        terminal.fail(str(error), "start_failed")
        return 1
    except _Stopped:
        if server is not None and server.ready:
            grace = settings.shutdown_grace
            text = f"Stopping. Running requests get up to {grace:g} s to finish; Ctrl-C again to stop now."
            terminal.say(text, "stopping", markup=f"\n{text}")
            until = time.monotonic() + grace + GRACE_MARGIN
            if gateway:
                gateway.drain()
            server.stop(grace, signals.hurry)
            if gateway:
                gateway.wait_drained(until, signals.hurry)
        return 0
    finally:
        if gateway is not None:
            gateway.stop()
        if server is not None:
            server.kill()


def _check_adapter_folders(settings: Settings) -> None:
    """A mistake shows before any model is loaded. Raises LaunchError."""
    for name in settings.names:
        folder = settings.of(name).adapter_folder
        if folder and not Path(folder).is_dir():
            raise LaunchError(f"adapter_folder: there is no folder {folder}")


def _welcome(terminal: Terminal, server: TritonServer, gateway: GatewayProcess | None, seconds: float) -> None:
    settings, url = server.settings, server.http_url
    embeds, talk = settings.task == "embed", ""
    if gateway and embeds:
        body = f'{{"model": "{gateway.model_name}", "input": "Hello"}}'
        talk = f"  curl {gateway.url}/v1/embeddings -H 'Content-Type: application/json' -d '{body}'\n"
    elif gateway:
        body = f'{{"model": "{gateway.model_name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        talk = f"  curl {gateway.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n"
    names = [gateway.model_name if gateway else settings.model_name, *settings.names[1:]]
    what = f"model {names[0]}" if len(names) == 1 else f"models {', '.join(names)}"
    markup = f"[green]Ready[/] after {seconds:.1f} s: {escape(settings.model)}\n" + escape(
        (
            f"  gateway {gateway.url}/v1 (OpenAI's API, {what}); to read: {gateway.url}/docs\n"
            + ("" if embeds else f"  chat    {gateway.url}/\n")
            if gateway
            else ""
        )
        + f"  HTTP    {url}\n"
        f"  gRPC    {settings.host}:{settings.grpc_port}\n"
        f"  metrics http://{settings.host}:{settings.metrics_port}/metrics\n"
        "Try:\n"
        f"{talk}{_examples(url, embeds)}Ctrl-C stops."
    )
    addresses = {"gateway": gateway and gateway.url, "http": url, "grpc": f"{settings.host}:{settings.grpc_port}"}
    terminal.say(f"Ready after {seconds:.1f} s: {settings.model}", "ready", markup=markup, **addresses)


def _examples(url: str, embeds: bool) -> str:
    if embeds:
        return f"  curl {url}/v2/models/decoder/generate -d " + """'{"text_input": "Hello", "embed": true}'\n"""
    return (
        f"  curl -N {url}/v2/models/decoder/generate_stream -d "
        """'{"text_input": "The sea is", "stream": true, "max_tokens": 32}'\n"""
        f"  {_own_name()} chat{'' if url == DEFAULT_URL else f' --url {url}'}\n"
    )


def _own_name() -> str:
    """To be typed in another terminal: the path, if the shell there would find no command, or another one."""
    own = Path(sys.argv[0])
    found = shutil.which(own.name)
    return own.name if not own.is_file() or (found and os.path.samefile(found, own)) else shlex.quote(str(own))
