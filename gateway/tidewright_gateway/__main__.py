"""`python -m tidewright_gateway`: the gateway by itself, from the environment. `tidewright gateway` has the flags."""

from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.serving import serve

if __name__ == "__main__":
    serve(GatewaySettings())
