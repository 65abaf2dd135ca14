"""`tidewright gateway`: the gateway alone, in front of Tritons that run elsewhere."""

from __future__ import annotations

import click

from tidewright.launch.options import settings_from, settings_options
from tidewright_gateway.config import GatewaySettings


@click.command()
@settings_options(GatewaySettings)
def gateway(**flags: str | None) -> None:
    """Serve OpenAI's API in front of one or many Tritons until Ctrl-C.

    `tidewright serve` starts one by itself, in front of its own Triton. Every option is also an environment variable
    TIDEWRIGHT_GATEWAY_<NAME>; flags win.

    \b
    Examples:
      tidewright gateway --replicas 10.0.0.1:8001,10.0.0.2:8001
      tidewright gateway --routing prefix --port 9090
    """
    from tidewright_gateway.http.serving import SetupError, serve

    settings = settings_from(GatewaySettings, flags)
    try:
        serve(settings)
    except SetupError as error:
        raise click.ClickException(str(error)) from None
