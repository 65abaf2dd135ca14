"""`tidewright top`: a live view of gateways and Tritons in the terminal."""

from __future__ import annotations

import time
from contextlib import nullcontext

import click

from tidewright.launch.errors import LaunchError
from tidewright.launch.gateway_control import base_url
from tidewright.launch.key_option import key_options
from tidewright.launch.terminal import output_console

GATEWAY, TRITON = "http://127.0.0.1:8080", "http://127.0.0.1:8002"
MAX_SOURCES = 64
PIPE_WIDTH = 140  # characters, where the output is no terminal


@click.command()
@click.argument("urls", nargs=-1, metavar="[URL]...")
@key_options
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds.")
@click.option("--once", is_flag=True, help="Show one interval and end; for scripts and tickets.")
def top(urls: tuple[str, ...], key: str | None, interval: float, once: bool) -> None:
    """Show live what gateways and Tritons do: requests, errors, latencies, replicas, queue, KV cache, keys.

    URL is the address of a gateway, or of a Triton's metrics port; either is detected. Without any, the defaults of
    `tidewright serve` on this machine are shown: 127.0.0.1:8080 and 127.0.0.1:8002. Rates and quantiles are those of
    the last interval. docs/metrics.md says what the figures mean.

    \b
    Examples:
      tidewright top
      tidewright top gateway.example:8080 10.0.0.1:8002 10.0.0.2:8002 --key-file ops.key
      tidewright top --once --interval 5
    """
    try:
        from rich.live import Live

        from tidewright.observe.look import looks
        from tidewright.observe.scrape import fetch_all
        from tidewright.observe.top import screen
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is missing: pip install 'tidewright[gateway]'") from None
    addresses = [f"{base}/metrics" for base in bases_of(urls)]
    console = output_console(PIPE_WIDTH)
    is_live = console.is_terminal and not once  # else each interval is printed below the last
    timeout = max(interval, 2.0)
    before = fetch_all(addresses, key, timeout)
    if all(isinstance(one, str) for one in before):
        troubles = "\n".join(f"{url} {why}" for url, why in zip(addresses, before, strict=True))
        raise click.ClickException(f"{troubles}\nGive the address of a gateway or of a Triton's metrics port.")
    try:
        with Live(console=console, screen=True, auto_refresh=False) if is_live else nullcontext() as live:
            while True:
                time.sleep(interval)
                now = fetch_all(addresses, key, timeout)
                found = looks(addresses, before, now)
                if live:
                    live.update(screen(found), refresh=True)
                else:
                    console.print(screen(found))
                if once:
                    break
                before = now
    except KeyboardInterrupt:
        return
    if any(look.is_foreign for look in found):
        raise click.ClickException("not all addresses are those of a gateway or of a Triton's metrics port")


def bases_of(urls: tuple[str, ...]) -> list[str]:
    """Base URLs of gateways and Tritons. Raises click.ClickException: one is none."""
    if len(urls) > MAX_SOURCES:
        raise click.UsageError(f"{len(urls)} addresses are more than {MAX_SOURCES}")
    try:
        return [base_url(url, "URL") for url in urls or (GATEWAY, TRITON)]
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
