"""`python -m tidewright_gateway`: the gateway by itself, from the environment. `tidewright gateway` has the flags."""

import sys

from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http.serving import SetupError, serve

if __name__ == "__main__":
    try:
        serve(GatewaySettings())
    except (SetupError, ValueError) as error:
        sys.exit(f"Error: {error}")
