"""Commands that are pointed at what is no HTTP port of Triton and no gateway say what was found, and what to give."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from launch.test_control import listener, response
from tidewright.launch.cli import main

COMMANDS = (("health",), ("drain", "--no-wait"), ("chat", "hi"), ("complete", "hi"))
PORT = "its port must be a number from 1 to 65535"
PORTS = "give Triton's HTTP port (8000 by default), or the gateway's (8080)"
# The first bytes of Triton's gRPC port: a frame of HTTP/2 settings.
HTTP2 = bytes.fromhex("000024040000000000000200000000000300000000000400400000000500400000000600004000fe0300000001")


def error(url: str, command: tuple[str, ...]) -> str:
    result = CliRunner().invoke(main, [*command, "--url", url])
    assert result.exit_code == 1
    assert result.stderr.isprintable() or result.stderr.rstrip("\n").isprintable()
    return result.stderr


@pytest.mark.parametrize("command", [*COMMANDS, ("memory",)])
@pytest.mark.parametrize(
    ("url", "why"),
    [
        *((url, "names no host") for url in ("", " ", "http://")),
        ("ftp://x", "must begin with http:// or https://"),
        *(
            (f"{url}:{port}", PORT)
            for url in ("http://127.0.0.1", "[::1]")
            for port in ("65536", "99999", "0", "a", "")
        ),
        ("http://[", "in brackets"),
    ],
)
def test_what_is_no_address(command: tuple[str, ...], url: str, why: str) -> None:
    said = error(url, command)
    assert said.startswith(f"Error: --url {url!r} is no address of a server, such as http://127.0.0.1:8000: ")
    assert why in said


@pytest.mark.parametrize("command", ["top", "diagnose"])
def test_what_is_no_address_of_metrics(command: str) -> None:
    result = CliRunner().invoke(main, [command, "127.0.0.1:8080", "http://me:secret@127.0.0.1:99999/metrics"])
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: URL 'http://127.0.0.1:99999/metrics' is no address of a server, such as http://127.0.0.1:8000: "
        f"{PORT}\n"
    )


def test_a_tracing_backend_at_no_port() -> None:
    result = CliRunner().invoke(main, ["trace", "id", "http://127.0.0.1:99999"])
    assert result.exit_code == 1
    assert PORT in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_port_of_metrics(command: tuple[str, ...]) -> None:
    with listener(response(200, b"")) as url:
        said = error(url, command)
    assert said.startswith(
        f"Error: {url} answers, but is neither Triton's HTTP port nor a gateway: perhaps a port of met"
    )
    assert PORTS in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_port_of_grpc(command: tuple[str, ...]) -> None:
    with listener(HTTP2) as url:
        said = error(url, command)
    assert "gRPC port" in said
    assert PORTS in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_of_a_gateway(command: tuple[str, ...]) -> None:
    body = {"error": {"message": "GET /x: no such path", "code": "no_such_path", "param": None, "type": "t"}}
    with listener(response(404, json.dumps(body).encode())) as url:
        said = error(f"{url}/v1/chat/completions", command)
    assert said.endswith("give http://HOST:PORT, without a path\n")
