"""Runs the application in uvicorn, and ends it gently."""

from __future__ import annotations

import logging
import sys

import uvicorn

from tidewright_gateway.app import make_app
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.connection import patient


def serve(settings: GatewaySettings) -> None:
    """Until Ctrl-C or SIGTERM."""
    logging.basicConfig(
        level=settings.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    uvicorn.run(
        make_app(settings),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=patient(settings.read_timeout, settings.send_timeout),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace)),
    )
