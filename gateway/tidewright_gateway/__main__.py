"""`python -m tidewright_gateway`: the gateway by itself, from the environment. `tidewright gateway` has the flags."""

import logging
import sys

from tidewright import logs
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http.serving import SetupError, serve

log = logging.getLogger("tidewright_gateway")

if __name__ == "__main__":
    settings = None
    try:
        settings = GatewaySettings()
        serve(settings)
    except (SetupError, ValueError) as error:
        if settings and settings.log_format == "json" and not settings.log_file:
            log.error("%s", error, extra=logs.event("start_failed"))
            sys.exit(1)
        sys.exit(f"Error: {error}")
