"""`tidewright model`: loads, unloads and lists the models of a running server, through a gateway or at one Triton."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import NamedTuple

import click

from tidewright.launch import gateway_control
from tidewright.launch.control import CONNECT_TIMEOUT, TroubleError, control, post
from tidewright.launch.errors import LaunchError
from tidewright.launch.health_commands import URL
from tidewright.launch.key_option import key_options
from tidewright.launch.repository import INDEX
from tidewright.served_models import FIRST_DECODER, changed_with, decoder_of, further_name

TIMEOUT = 1200.0  # seconds; a large model takes minutes to load, and its last requests some time to end
POLL_INTERVAL = 0.2  # seconds


class Loaded(NamedTuple):
    name: str
    state: str


@click.group()
def model() -> None:
    """Load, unload and list the models that a running server was started with.

    A model that is unloaded gives its memory back; requests to the others go on as if nothing had happened. It must be
    one of `tidewright serve --model A --model B`. With `load: false` in serving.yaml, one waits from the start to be
    loaded.

    Through a gateway a command is for all replicas, and needs a key with the role admin if the gateway requires keys.
    At one Triton, the first model is called `decoder`.

    \b
    Examples:
      tidewright model list
      tidewright model unload small
      tidewright model load small
      tidewright model load small --url https://gateway.example:8080 --key-file ops.key
    """


@model.command()
@click.argument("name")
@URL
@key_options
def load(name: str, url: str, key: str | None) -> None:
    """Load the model NAME, and return when it takes requests. One that is loaded stays as it is."""
    try:
        url = gateway_control.base_url(url)
        if gateway := gateway_control.find(url, key, CONNECT_TIMEOUT):
            gateway.command("/admin/models/load", {"model": name}, TIMEOUT)
        else:
            for part in _chain(url, name):
                _change(url, part, "load")
            control(url, "health", CONNECT_TIMEOUT, _decoder(name))
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Loaded {name}.")


@model.command()
@click.argument("name")
@URL
@key_options
def unload(name: str, url: str, key: str | None) -> None:
    """Unload the model NAME: its requests get shutdown_grace seconds to finish, and new ones are refused."""
    try:
        url = gateway_control.base_url(url)
        if gateway := gateway_control.find(url, key, CONNECT_TIMEOUT):
            gateway.command("/admin/models/unload", {"model": name}, TIMEOUT)
        else:
            for part in reversed(_chain(url, name)):
                _change(url, part, "unload")
            deadline = time.monotonic() + TIMEOUT
            while _states(url).get(_decoder(name)) == "UNLOADING" and time.monotonic() < deadline:
                time.sleep(POLL_INTERVAL)
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Unloaded {name}.")


@model.command("list")
@URL
@key_options
def list_models(url: str, key: str | None) -> None:
    """List the models, and how each is: `loaded`, `not loaded`, or what is wrong."""
    try:
        url = gateway_control.base_url(url)
        if gateway := gateway_control.find(url, key, CONNECT_TIMEOUT):
            away = gateway.health.get("models_in_trouble", ())
            names = [str(one["id"]) for one in gateway.models(CONNECT_TIMEOUT) if not one.get("parent")]
            rows = [Loaded(name, "no replica can serve it" if name in away else "served") for name in names]
        else:
            rows = _at_triton(url)
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    width = max(len(row.name) for row in rows)
    for row in rows:
        click.echo(f"{row.name:{width}}  {row.state}")


def _at_triton(url: str) -> list[Loaded]:
    rows = []
    for triton_name, state in sorted(_states(url).items()):
        name = _name(triton_name)
        if not name:
            continue
        told = {"READY": "loaded", "": "not loaded", "UNAVAILABLE": "not loaded"}.get(state, state.lower())
        if state == "READY":
            try:
                control(url, "health", CONNECT_TIMEOUT, triton_name)
            except LaunchError as error:
                told = str(error)
        rows.append(Loaded(name, told))
    return rows


def _name(triton_name: str) -> str:
    """Of a model, by its decoder, as that is called here; empty: it is none. The first is called as its decoder is."""
    return FIRST_DECODER if triton_name == FIRST_DECODER else further_name(triton_name)


def _decoder(name: str) -> str:
    return FIRST_DECODER if name == FIRST_DECODER else decoder_of(name)


def _chain(url: str, name: str) -> Sequence[str]:
    """The Triton models of a model. Raises TroubleError: there is no such model."""
    return changed_with(decoder_at(url, name))


def decoder_at(url: str, name: str) -> str:
    """The Triton model that generates for a model. Raises TroubleError: there is no such model."""
    states = _states(url)
    if _decoder(name) in states:
        return _decoder(name)
    names = ", ".join(filter(None, map(_name, sorted(states))))
    raise TroubleError(f"{url} has no model {name!r}; it was started with: {names}")


def _states(url: str) -> dict[str, str]:
    """Of Triton's models; empty where it says nothing, as of one that was never loaded."""
    try:
        return {one["name"]: one.get("state", "") for one in json.loads(post(url + INDEX, {}, CONNECT_TIMEOUT))}
    except (ValueError, TypeError, KeyError):
        raise TroubleError(f"{url} did not answer as Triton does") from None


def _change(url: str, triton_name: str, word: str) -> None:
    try:
        post(f"{url}/v2/repository/models/{triton_name}/{word}", {}, TIMEOUT)
    except TroubleError as error:
        raise TroubleError(f"{triton_name} could not be {word}ed: {error}; see the server's log") from None
