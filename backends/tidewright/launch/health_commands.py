"""`tidewright health` and `tidewright drain`: for probes and hooks of Kubernetes, gateways and people."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import click

from tidewright.launch import gateway_control, repository
from tidewright.launch.control import (
    CONNECT_TIMEOUT,
    DeadStubError,
    NoAnswerError,
    TroubleError,
    UnreachableError,
    check_alive,
    control,
)
from tidewright.launch.errors import LaunchError
from tidewright.launch.key_option import key_options

if TYPE_CHECKING:
    from tidewright.schema import ControlWord

URL = click.option(
    "--url",
    default="http://127.0.0.1:8000",
    show_default=True,
    help="Address of Triton's HTTP port, or of a gateway; either is detected.",
)


@click.command()
@URL
@key_options
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True, help="Seconds.")
@click.option("--live", is_flag=True, help="Only whether it answers, and so needs no restart: for liveness probes.")
def health(url: str, key: str | None, timeout: float, live: bool) -> None:
    """Say whether a server can take requests; ends with 0 if it can, else with 1 and the reason.

    Triton is healthy if it and its Python stub answer, and the engine, with all of its ranks, has computed a step or
    answered a ping within heartbeat_timeout. It does not queue behind requests, so a busy server is healthy. Triton's
    own /v2/health/ready knows nothing of the engine.

    Of several models, one that takes requests is enough; --live asks the first, or those that are loaded without it.

    A gateway is healthy if one of its replicas can take requests. It names those that can't to admins, or to anyone if
    it requires no keys.

    With --live, a Triton is alive if it and the Python stub of the decoder answer: also while it is full, and while its
    engine is started again. `tidewright serve` mends what is found here by itself, within minutes; only if it did not,
    a restart of the whole helps. A Triton that ends takes no connections while its last requests run: let a probe fail
    for longer than shutdown_grace before it counts.

    \b
    Examples:
      tidewright health && echo ready
      tidewright health --live && echo alive
      tidewright health --url http://10.0.0.1:8000 --timeout 1
      tidewright health --url https://gateway.example:8080 --key-file ops.key
    """
    deadline = time.monotonic() + timeout
    try:
        url = gateway_control.base_url(url)
        gateway = gateway_control.find(url, key, timeout)
        left = max(deadline - time.monotonic(), 0.001)
        troubles: list[str] = []
        if live:
            if not gateway:  # which has just answered
                _check_alive(url, deadline)
        elif gateway:
            troubles = gateway.check(left)
        else:
            try:
                control(url, "health", left)
            except TroubleError as error:
                told = repository.explained(error, url, "decoder")
                if not _another(url, "health", deadline):
                    raise told from None
                troubles.append(f"the first model takes no requests: {told}")
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    click.echo("alive" if live else "healthy")
    for trouble in troubles:
        click.echo(trouble, err=True)


@click.command()
@URL
@key_options
@click.option(
    "--replica", metavar="HOST:PORT", help="Through a gateway: the replica to end. Not needed if there is only one."
)
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return when the server has ended.")
def drain(url: str, key: str | None, replica: str | None, wait: bool) -> None:
    """End a server gently: no new requests, and those that run get shutdown_grace seconds to finish.

    The same as SIGTERM to `tidewright serve`. What has not finished then ends with UNAVAILABLE and the reason.

    Through a gateway it ends one replica, named by its gRPC address as the gateway has it, and returns when the gateway
    no longer sees it. If the gateway requires keys, the key needs the role admin. To end the gateway itself, send it
    SIGTERM.

    \b
    Examples:
      tidewright drain
      tidewright drain --url https://gateway.example:8080 --key-file ops.key --replica 10.0.0.1:8001
    """
    try:
        url = gateway_control.base_url(url)
        if gateway := gateway_control.find(url, key, CONNECT_TIMEOUT):
            address = gateway.drain(replica, CONNECT_TIMEOUT)
            click.echo(f"Draining {address}.")
            if wait:
                gateway.wait_ended(address)
            return
        if replica:
            raise click.UsageError(f"--replica is for gateways, and {url} is none")
        try:
            control(url, "drain", CONNECT_TIMEOUT)
        except TroubleError:  # the first model may not be loaded: any of several passes it on
            if not _another(url, "drain", time.monotonic() + CONNECT_TIMEOUT):
                raise
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


def _another(url: str, word: ControlWord, deadline: float) -> bool:
    """Whether a model beside the first answers it with yes."""
    for decoder in repository.further_decoders(url, max(deadline - time.monotonic(), 0.001)):
        with contextlib.suppress(TroubleError, DeadStubError, NoAnswerError):
            control(url, word, max(deadline - time.monotonic(), 0.001), decoder)
            return True
    return False


def _check_alive(url: str, deadline: float) -> None:
    """Of several models, those that are loaded."""
    left = max(deadline - time.monotonic(), 0.001)
    try:
        check_alive(url, left)
    except TroubleError as error:
        others = repository.further_decoders(url, left) if repository.is_away(error) else []
        if not others:
            raise
        for decoder in others:
            check_alive(url, max(deadline - time.monotonic(), 0.001), decoder)
