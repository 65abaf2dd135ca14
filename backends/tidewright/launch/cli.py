"""The `tidewright` command. Parts are imported when they run, so that `--help` is quick."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import click

from tidewright import __version__
from tidewright.cache import EMBEDDED_MODEL


class _LazyGroup(click.Group):
    """A group whose commands stand in other modules, imported only when one is asked for."""

    elsewhere = {  # noqa: RUF012 - a table, never changed
        "bench": "tidewright.launch.bench_command",
        "chat": "tidewright.launch.client_commands",
        "complete": "tidewright.launch.client_commands",
        "diagnose": "tidewright.launch.diagnose_command",
        "drain": "tidewright.launch.health_commands",
        "export-onnx": "tidewright.launch.export_command",
        "gateway": "tidewright.launch.gateway_command",
        "health": "tidewright.launch.health_commands",
        "keys": "tidewright.launch.keys_command",
        "lora": "tidewright.launch.lora_command",
        "memory": "tidewright.launch.memory_command",
        "model": "tidewright.launch.model_command",
        "plan": "tidewright.launch.plan_command",
        "quantize": "tidewright.launch.quantize_command",
        "serve": "tidewright.launch.serve_command",
        "top": "tidewright.launch.top_command",
        "trace": "tidewright.launch.trace_command",
        "worker": "tidewright.launch.worker_command",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self.elsewhere})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.elsewhere:
            module = importlib.import_module(self.elsewhere[cmd_name])
            command: click.Command = getattr(module, cmd_name.replace("-", "_"))
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tidewright")
def main() -> None:
    """Serve large language models on NVIDIA Triton.

    \b
    To begin:
      tidewright doctor     is everything here that serving needs?
      tidewright serve      serve the embedded model
      tidewright chat       talk with it, from another terminal
    """


@main.command()
@click.argument("model", default=EMBEDDED_MODEL)
@click.option("--force", is_flag=True, help="Make it anew even if it is ready.")
@click.option("--fallback/--no-fallback", default=True, show_default=True, help="Also make its ONNX fallback.")
@click.option("--fallback-model", metavar="MODEL", help="Make the fallback from another, smaller model.")
@click.option(
    "--tokenizer-only", is_flag=True, help="For a machine that runs only a gateway: fetch and keep no weights."
)
def prepare(model: str, force: bool, fallback: bool, fallback_model: str | None, tokenizer_only: bool) -> None:
    """Make MODEL ready to serve, and print its folder.

    MODEL is the embedded model's name (smollm2-135m, the default), a .gguf file of the Llama family,
    a Hugging Face folder, or an id of the Hugging Face hub. What is ready already costs nothing.

    The fallback is the model as `tidewright export-onnx` makes it, in int8.

    \b
    Examples:
      tidewright prepare
      tidewright prepare --tokenizer-only
      tidewright prepare ./model.gguf --no-fallback
      tidewright prepare HuggingFaceTB/SmolLM2-1.7B-Instruct --fallback-model smollm2-135m
    """
    from rich.console import Console

    from tidewright.launch.errors import ExportError, LaunchError
    from tidewright.launch.prepare import prepare as make_ready

    console = Console(stderr=True)
    try:
        click.echo(make_ready(model, console, force, weights=not tokenizer_only))
        if fallback and not tokenizer_only:
            from tidewright.launch.export_command import prepare_fallback

            prepare_fallback(model, fallback_model or model, console, force)
    except ExportError as error:
        raise click.ClickException(f"{model} is ready, but its fallback is not: {error}") from None
    except LaunchError as error:
        raise click.ClickException(str(error)) from None


def _port(name: str, default: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option of `serve`, whose environment variable counts as well."""
    return click.option(
        f"--{name}-port",
        type=click.IntRange(0, 65535),
        default=default,
        show_default=True,
        envvar=f"TIDEWRIGHT_{name.upper()}_PORT",
        help="As of `tidewright serve`." + (" 0: no gateway." if name == "gateway" else ""),
    )


@main.command()
@_port("http", 8000)
@_port("grpc", 8001)
@_port("metrics", 8002)
@_port("gateway", 8080)
def doctor(http_port: int, grpc_port: int, metrics_port: int, gateway_port: int) -> None:
    """Check whether this machine can serve; ends with 1 if it can't.

    Each line names what was looked at, what was found and, where something is amiss, what to do about it.
    """
    from tidewright.launch.doctor import print_report, run_checks

    ports = {http_port: "HTTP", grpc_port: "gRPC", metrics_port: "metrics", gateway_port: "gateway"}
    checks = run_checks({port: use for port, use in ports.items() if port})
    print_report(checks)
    if any(check.status == "fail" for check in checks):
        sys.exit(1)
