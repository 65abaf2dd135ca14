"""`tidewright diagnose` at a real gateway."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from click.testing import CliRunner

from helpers.api_keys import add
from helpers.echo_replica import EchoReplica
from helpers.gateway import RunningGateway
from tidewright.launch.cli import main
from tidewright_gateway.auth.callers import Role
from tidewright_gateway.auth.stores import FileStore


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


def test_keys_that_are_gone(model_dir: Path, tmp_path: Path) -> None:
    """As when Redis comes back without its data: nobody can see the metrics any more."""
    store = FileStore(tmp_path / "keys.yaml")
    key = add(store, "ops", role=Role.ADMIN)
    (tmp_path / "ops.key").write_text(key)
    options = ["--key-file", str(tmp_path / "ops.key")]
    with EchoReplica() as replica, RunningGateway(model_dir, replica, keys=tmp_path / "keys.yaml") as gateway:
        while gateway.http.get("/health").status_code != 200:  # until it knows its replica
            time.sleep(0.05)
        assert diagnose(gateway.url, *options) == (0, "Nothing is wrong.\n")
        store.change("ops", lambda _: None)
        while "key_store_empty" not in (health := gateway.http.get("/health").json()):
            time.sleep(0.05)
        assert health == {"status": "ready", "lost_stores": ["keys"], "key_store_empty": True}
        code, text = diagnose(gateway.url, *options)
        told = CliRunner().invoke(main, ["health", "--url", gateway.url, *options])
    assert code == 1
    assert "the key store is empty, so every API key is refused" in text
    assert "troubleshooting.md#no-keys" in text
    assert told.exit_code == 0
    assert told.stderr.startswith("the key store of the gateway is empty")


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
