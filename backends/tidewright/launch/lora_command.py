"""`tidewright lora`: LoRA adapters of a running server, through a gateway or at one Triton."""

from __future__ import annotations

import json
from typing import Any

import click

from tidewright.launch import gateway_control, repository
from tidewright.launch.control import CONNECT_TIMEOUT, TroubleError, told
from tidewright.launch.errors import LaunchError
from tidewright.launch.health_commands import URL
from tidewright.launch.key_option import key_options
from tidewright.served_models import FIRST_DECODER, decoder_of

_MODEL = click.option(
    "--model",
    metavar="NAME",
    help="Of several models in one server, the one that the adapter belongs to; not needed for the first.",
)
TIMEOUT = 120.0  # seconds; a gateway tells all its replicas, which read the adapter from their disks


@click.group()
def lora() -> None:
    """Load, unload and list the LoRA adapters of a running server.

    The server must have been started with --adapter-folder: adapters are loaded from below that folder only, in Hugging
    Face PEFT's format. A loaded adapter is called by its name: as `model` of the OpenAI API, or `lora_name` at Triton.

    Through a gateway a command is for all replicas, also for those that come later, and needs a key with the role admin
    if the gateway requires keys. Told to one Triton, its gateways pass it on to the other replicas.

    \b
    Examples:
      tidewright serve --adapter-folder ./adapters
      tidewright lora load sql sql-v2          # the folder ./adapters/sql-v2, as `sql`
      tidewright lora list
      tidewright lora unload sql
    """


@lora.command()
@click.argument("name")
@click.argument("path")
@URL
@_MODEL
@key_options
def load(name: str, path: str, url: str, model: str | None, key: str | None) -> None:
    """Load the adapter in the folder PATH of the server, and call it NAME.

    PATH is absolute, or relative to the server's adapter folder. A NAME has up to 128 letters, digits or ._:/@+-. To
    replace an adapter, unload it first, or load the new one under another name.

    \b
    Examples:
      tidewright lora load sql sql-v2
      tidewright lora load sql /srv/adapters/sql-v2 --url https://gateway.example:8080 --key-file ops.key
    """
    try:
        url = gateway_control.base_url(url)
        if gateway := gateway_control.find(url, key, CONNECT_TIMEOUT):
            body = {"lora_name": name, "lora_path": path, **({"base_model_name": model} if model else {})}
            gateway.command("/v1/load_lora_adapter", body, TIMEOUT)
        else:
            _control(url, model, f"load_lora:{json.dumps({'name': name, 'path': path})}")
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Loaded {name}.")


@lora.command()
@click.argument("name")
@URL
@_MODEL
@key_options
def unload(name: str, url: str, model: str | None, key: str | None) -> None:
    """Unload the adapter NAME: requests that have it finish, and new ones are refused.

    \b
    Example:
      tidewright lora unload sql
    """
    try:
        url = gateway_control.base_url(url)
        if gateway := gateway_control.find(url, key, CONNECT_TIMEOUT):
            gateway.command("/v1/unload_lora_adapter", {"lora_name": name}, TIMEOUT)
        else:
            _control(url, model, f"unload_lora:{json.dumps({'name': name})}")
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Unloaded {name}.")


@lora.command("list")
@URL
@_MODEL
@key_options
def list_adapters(url: str, model: str | None, key: str | None) -> None:
    """List the adapters that are loaded: of all replicas with the name of their folder, or of one Triton with more.

    \b
    Examples:
      tidewright lora list
      tidewright lora list --url http://127.0.0.1:8080
    """
    try:
        url = gateway_control.base_url(url)
        if gateway := gateway_control.find(url, key, CONNECT_TIMEOUT):
            adapters = [one for one in gateway.models(CONNECT_TIMEOUT) if one.get("parent")]
            found = [one for one in adapters if model in (None, one["parent"])]
            rows = [(str(one["id"]), f"{one['root']}, of {one['parent']}") for one in found]
        else:
            rows = [_row(adapter) for adapter in json.loads(_control(url, model, "list_lora"))]
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    if not rows:
        click.echo("no adapter is loaded", err=True)
    width = max((len(name) for name, _ in rows), default=0)
    for name, rest in rows:
        click.echo(f"{name:{width}}  {rest}")


def _row(adapter: dict[str, Any]) -> tuple[str, str]:
    size = f"rank {adapter['rank']}, {adapter['bytes'] / 1e6:.1f} MB"
    return str(adapter["name"]), f"{adapter['state']}, {size}, {adapter['path']}"


def _control(url: str, model: str | None, word: str) -> str:
    """The answer of a model's decoder at one Triton; of the first model if it is not named."""
    decoder = decoder_of(model) if model else FIRST_DECODER
    try:
        return told(url, word, TIMEOUT, decoder)
    except TroubleError as error:
        raise repository.explained(error, url, decoder) from None
