"""`tidewright gateway`: the gateway alone, in front of Tritons that run elsewhere."""

from __future__ import annotations

import os
import sys

import click
from rich.markup import escape

from tidewright.config_file import as_file
from tidewright.launch.errors import LaunchError
from tidewright.launch.options import grouped, settings_from, settings_options
from tidewright.launch.terminal import Terminal
from tidewright_gateway.config import CONFIG_FILE_VARIABLE, GROUPS, GatewaySettings


@click.command(cls=grouped(GROUPS))
@click.option("--config", type=click.Path(), help="YAML file with any of these options, in their groups.")
@click.option("--print-config", is_flag=True, help="Print all options as such a file, and end. Passwords are left out.")
@settings_options(GatewaySettings)
def gateway(config: str | None, print_config: bool, **flags: str | None) -> None:
    """Serve OpenAI's API in front of one or many Tritons until Ctrl-C.

    `tidewright serve` starts one by itself, in front of its own Triton. Every option is also an environment variable
    TIDEWRIGHT_GATEWAY_<NAME>, and one of the YAML file; flags win over the environment, and that over the file.

    \b
    Examples:
      tidewright gateway --replicas 10.0.0.1:8001,10.0.0.2:8001
      tidewright gateway --routing prefix --port 9090
      tidewright gateway --print-config > gateway.yaml
      tidewright gateway --config gateway.yaml
    """
    from tidewright_gateway.http.serving import SetupError, serve

    if config:
        os.environ[CONFIG_FILE_VARIABLE] = config
    settings = settings_from(GatewaySettings, flags)
    if print_config:
        click.echo(as_file(settings.in_groups()), nl=False)
        return
    try:
        terminal = Terminal("gateway", settings.log_format, settings.log_level, settings.log_file)
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
    try:
        serve(settings, announce=lambda text: terminal.say(text, "gateway_ready"))
    except SetupError as error:
        terminal.fail(str(error), "start_failed", markup=f"Error: {escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:  # uvicorn raises it again when it has ended everything
        pass
