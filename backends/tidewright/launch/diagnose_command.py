"""`tidewright diagnose`: the first command of every runbook. Says what is wrong, and where to read on."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from typing import Any

import click

from tidewright.launch.errors import LaunchError
from tidewright.launch.gateway_control import find
from tidewright.launch.key_option import key_options
from tidewright.launch.top_command import bases_of

TIMEOUT = 5.0  # seconds for an answer
RUNBOOKS = "docs/troubleshooting.md"
_STYLES = ("bold red", "yellow", "dim")


@click.command()
@click.argument("urls", nargs=-1, metavar="[URL]...")
@key_options
@click.option(
    "--interval", type=click.FloatRange(0.1, 600), default=2.0, show_default=True, help="Seconds to look at rates."
)
def diagnose(urls: tuple[str, ...], key: str | None, interval: float) -> None:
    """Say what is wrong with running gateways and Tritons; ends with 0 if nothing is, else with 1.

    URL is the address of a gateway, or of a Triton's metrics port; either is detected. Without any, the defaults of
    `tidewright serve` on this machine are looked at. Each finding names the section of docs/troubleshooting.md that
    goes on from there. Findings about one caller, or about what is over, do not make it end with 1.

    \b
    Examples:
      tidewright diagnose
      tidewright diagnose gateway.example:8080 10.0.0.1:8002 10.0.0.2:8002 --key-file ops.key
    """
    from rich.console import Console
    from rich.text import Text

    from tidewright.observe.findings import Severity
    from tidewright.observe.findings import diagnose as find
    from tidewright.observe.look import looks
    from tidewright.observe.scrape import fetch_all

    bases = bases_of(urls)
    addresses = [f"{base}/metrics" for base in bases]
    try:
        before = fetch_all(addresses, key, timeout=TIMEOUT)
        time.sleep(interval)
        after = fetch_all(addresses, key, timeout=TIMEOUT)
    except KeyboardInterrupt:
        raise click.Abort from None
    seen = [
        replace(look, status=_status(base, key)) if look.is_gateway or look.change is None else look
        for base, look in zip(bases, looks(addresses, before, after), strict=True)
    ]
    console, found = Console(highlight=False, soft_wrap=True), find(seen)
    for finding in found:
        word = Text(finding.severity.name.lower().ljust(9), style=_STYLES[finding.severity])
        console.print(word + Text(f"{finding.where}: {finding.cause}"))
        console.print(Text(f"{'':9}{RUNBOOKS}#{finding.runbook}", style="dim"))
    for look in seen:
        if look.is_foreign:
            raise click.ClickException(f"{look.where} has no metrics of a gateway or Triton")
    is_bad = any(finding.severity < Severity.INFO for finding in found)
    if not is_bad:
        console.print("Nothing is wrong." if not found else "Nothing is wrong with the service itself.")
    sys.exit(is_bad)


def _status(base: str, key: str | None) -> dict[str, Any]:
    """What the gateway says of itself; without a good key, what it tells everybody. Empty if it is none."""
    try:
        gateway = find(base, key, TIMEOUT)
        if gateway is None:
            return {}
        with contextlib.suppress(LaunchError):
            return {**gateway.health, **gateway.status(TIMEOUT)}
        return gateway.health
    except LaunchError:
        return {}
