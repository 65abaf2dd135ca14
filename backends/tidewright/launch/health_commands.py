"""`tidewright health` and `tidewright drain`: for probes and hooks of Kubernetes, gateways and people."""

from __future__ import annotations

import time

import click

from tidewright.launch.control import TroubleError, UnreachableError, control
from tidewright.launch.errors import LaunchError

_URL = click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Address of the server.")


@click.command()
@_URL
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True, help="Seconds.")
def health(url: str, timeout: float) -> None:
    """Say whether a server can take requests; ends with 0 if it can, else with 1 and the reason.

    Healthy means: Triton and its Python stub answer, and the engine, with all of its ranks, has computed a step or
    answered a ping within heartbeat_timeout. It does not queue behind requests, so a busy server is healthy. Triton's
    own /v2/health/ready knows nothing of the engine.

    \b
    Examples:
      tidewright health && echo ready
      tidewright health --url http://10.0.0.1:8000 --timeout 1
    """
    try:
        control(url.rstrip("/"), "health", timeout)
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    click.echo("healthy")


@click.command()
@_URL
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return when the server has ended.")
def drain(url: str, wait: bool) -> None:
    """End a server gently: no new requests, and those that run get shutdown_grace seconds to finish.

    The same as SIGTERM to `tidewright serve`. What has not finished then ends with UNAVAILABLE and the reason.
    """
    url = url.rstrip("/")
    try:
        control(url, "drain", timeout=5)
        click.echo("Draining.")
        while wait:
            time.sleep(0.2)
            try:
                control(url, "health", timeout=60)
            except TroubleError:
                pass
            except UnreachableError:
                return
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
