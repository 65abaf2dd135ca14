"""`tidewright diagnose` at a real gateway."""

from __future__ import annotations

import socket
from pathlib import Path

from click.testing import CliRunner

from helpers.echo_replica import EchoReplica
from helpers.gateway import RunningGateway
from tidewright.launch.cli import main


def diagnose(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["diagnose", *arguments, "--interval", "0.2"])
    return done.exit_code, done.output


def test_a_service_that_is_well(echo_gateway: RunningGateway) -> None:
    assert diagnose(echo_gateway.url) == (0, "Nothing is wrong.\n")


def test_an_endpoint_that_is_gone(echo_gateway: RunningGateway) -> None:
    code, text = diagnose(echo_gateway.url, "127.0.0.1:1")
    assert code == 1
    assert text.startswith("critical 127.0.0.1:1: it can't be reached")
    assert "docs/troubleshooting.md#" in text


def test_a_replica_that_is_gone_with_its_trouble(model_dir: Path) -> None:
    with EchoReplica(limit=5) as replica, RunningGateway(model_dir, replica) as gateway:
        replica.grpc_url, other = "127.0.0.1:1", replica.grpc_url
        with RunningGateway(model_dir, replica) as lonely:
            code, text = diagnose(lonely.url)
        replica.grpc_url = other
        assert diagnose(gateway.url)[0] == 0
    assert code == 1
    assert "critical" in text
    assert "replica 127.0.0.1:1 takes no requests" in text
    assert "refused" in text


def test_what_is_no_gateway_and_no_triton(echo_gateway: RunningGateway) -> None:
    code, text = diagnose(f"{echo_gateway.url}/health")
    assert code == 1
    assert "status 404" in text


def test_addresses_that_are_none() -> None:
    for url in ("http://[x", "ftp://x", ""):
        code, text = diagnose(url)
        assert code == 1
        assert "Traceback" not in text


def test_an_endpoint_that_hangs_makes_no_other_look_dead(echo_gateway: RunningGateway) -> None:
    """Each is judged by the time of its own answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code, text = diagnose(echo_gateway.url, f"127.0.0.1:{silent.getsockname()[1]}")
    assert code == 1
    assert text.count("critical") == 1
    assert "did not answer within 5 s" in text
