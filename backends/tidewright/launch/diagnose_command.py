"""`tidewright diagnose`: the first command of every runbook. Says what is wrong, and where to read on."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import click

from tidewright.launch.key_option import key_options
from tidewright.launch.top_command import GATEWAY, MAX_SOURCES, TRITON, metrics_url

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

    if len(urls) > MAX_SOURCES:
        raise click.UsageError(f"{len(urls)} addresses are more than {MAX_SOURCES}")
    addresses = [metrics_url(url) for url in urls or (GATEWAY, TRITON)]
    try:
        before = fetch_all(addresses, key, timeout=5.0)
        time.sleep(interval)
        after = fetch_all(addresses, key, timeout=5.0)
    except KeyboardInterrupt:
        raise click.Abort from None
    seen = [
        replace(look, status=_status(look.url, key)) if look.is_gateway else look
        for look in looks(addresses, before, after)
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


def _status(metrics: str, key: str | None) -> dict[str, Any]:
    """What the gateway says of itself; empty if it does not tell."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(
            metrics.removesuffix("/metrics") + "/admin/status", headers=headers, timeout=5.0, trust_env=False
        )
        told = answer.json() if answer.status_code == 200 else {}
    except (httpx.HTTPError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
