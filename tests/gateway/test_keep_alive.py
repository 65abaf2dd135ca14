"""Connections without a request: the client ends them, not the gateway under the client's next request."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from gateway.test_bad_clients import connect, read_all, read_answer
from helpers.echo_replica import EchoReplica
from helpers.gateway import RunningGateway
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.http.serving import _options

LONGEST_OF_OTHERS = 60.0  # seconds: AWS' load balancers and nginx; OpenAI's client has 5


def test_they_outlive_those_of_clients_and_proxies() -> None:
    assert _options(GatewaySettings())["timeout_keep_alive"] > LONGEST_OF_OTHERS


def test_they_end_at_last(model_dir: Path, echo: EchoReplica) -> None:
    with RunningGateway(model_dir, echo, keep_alive=1) as gateway, closing(connect(gateway)) as client:
        for _ in range(2):
            client.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert read_answer(client)[0] == 200
        assert read_all(client) == b""
