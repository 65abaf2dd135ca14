"""The Rust client: its own tests, with the scripted gateway and with a real one; its examples; and wrong addresses."""

from __future__ import annotations

import json
import re
import shlex
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gateway.test_keys_command import write_certificate
from helpers.keyed_gateway import Keyed
from helpers.rust import FOLDER, format_check, run_cargo, run_cargo_tests, run_documented, try_cargo
from helpers.triton import RunningServer
from tidewright.bench.machine import free_ports

VECTORS = [
    vector
    for file in (FOLDER.parent / "conformance" / "vectors").glob("*.json")
    for vector in json.loads(file.read_text())
]
AGAINST_GATEWAY = [vector["name"] for vector in VECTORS if "against" in vector]


def test_it_is_formatted() -> None:
    assert format_check() == ""


@pytest.mark.slow
def test_clippy_and_rustdoc_have_nothing_to_say() -> None:
    """Each compiles all crates anew: a minute of two cores."""
    run_cargo("clippy", "--all-targets", "--", "-D", "warnings")
    run_cargo("clippy", "--no-default-features", "--features", "rustls", "--", "-D", "warnings")
    run_cargo("doc", "--no-deps", RUSTDOCFLAGS="-D warnings")


def test_its_own_tests_pass() -> None:
    said = run_cargo_tests("--", "--nocapture")
    assert f"{len(VECTORS) - len(AGAINST_GATEWAY)} vectors played" in said
    assert [name for name in AGAINST_GATEWAY if f"left out: {name}" not in said] == []


def test_the_vectors_of_a_real_gateway_pass(keyed: Keyed) -> None:
    variables = {"TIDEWRIGHT_URL": keyed.gateway.url, "TIDEWRIGHT_KEY": keyed.key}
    said = run_cargo_tests("--test", "conformance", "real_gateway", "--", "--nocapture", **variables)
    assert f"{len(AGAINST_GATEWAY)} vectors of a real gateway played" in said


# What each example prints, beside the model's words.
EXAMPLES = {
    "chat": "prompt_tokens",
    "stream": "prompt_tokens",
    "tools": 'get_weather({"city"',
    "errors_and_retries": "no such model",
    "cancel": " ...",
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_works(keyed: Keyed, example: str) -> None:
    variables = {"TIDEWRIGHT_URL": f"{keyed.gateway.url}/v1", "TIDEWRIGHT_KEY": keyed.key}
    assert EXAMPLES[example] in run_cargo("run", "--quiet", "--example", example, **variables).stdout


def test_every_example_is_run() -> None:
    assert {path.stem for path in (FOLDER / "examples").glob("*.rs")} == set(EXAMPLES)


def test_the_documented_command_runs_an_example_with_debians_crates(keyed: Keyed) -> None:
    """As it stands in the README, whole."""
    (command,) = re.findall(r"^cargo --offline (?:.*\\\n)*.*", (FOLDER / "README.md").read_text(), re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    done = run_documented(words, TIDEWRIGHT_URL=keyed.gateway.url, TIDEWRIGHT_KEY=keyed.key)
    assert done.returncode == 0, done.stderr
    assert EXAMPLES["stream"] in done.stdout


def failure(url: str, **variables: str) -> str:
    """What a user reads whose chat fails."""
    done = try_cargo("run", "--quiet", "--example", "chat", TIDEWRIGHT_URL=url, **variables)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def test_a_wrong_address_says_what_to_change(server: RunningServer, keyed: Keyed) -> None:
    (nobody,) = free_ports(1)
    assert "http://HOST:PORT" in failure(f"127.0.0.1:{keyed.gateway.port}")
    assert "nothing listens there" in failure(f"http://127.0.0.1:{nobody}")
    assert "the host's name is not known" in failure("http://no-such-host.invalid:8080")
    assert "begins with http://" in failure(f"https://127.0.0.1:{keyed.gateway.port}")
    for of_triton in (server.triton.http_url, f"http://{server.grpc_url}"):
        said = failure(of_triton)
        assert "Triton's own ports" in said, said
        assert "(8080)" in said, said


def test_a_wrong_key_says_what_to_change(keyed: Keyed) -> None:
    said = failure(keyed.gateway.url, TIDEWRIGHT_KEY=keyed.expired)
    assert "Unauthenticated" in said
    assert "expired" in said
    assert "TIDEWRIGHT_KEY" in said
    assert keyed.expired not in said
    assert "TIDEWRIGHT_KEY" in failure(keyed.gateway.url)


class _Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    return write_certificate(tmp_path)


@pytest.fixture
def tls_port(certificate: tuple[str, str]) -> Iterator[int]:
    """Of a server whose certificate is its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def get_request(self) -> tuple[ssl.SSLSocket, object]:  # type: ignore[override]
            accepted, address = super().get_request()
            return context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False), address

        def handle_error(self, *_: object) -> None:
            pass  # clients that do not trust it

    with Server(("127.0.0.1", 0), _Ready) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running.server_address[1]
        running.shutdown()
        thread.join()


def test_a_certificate_of_ones_own_is_trusted_where_it_is_given(certificate: tuple[str, str], tls_port: int) -> None:
    url = f"https://localhost:{tls_port}"
    run_cargo_tests("--test", "trust", TIDEWRIGHT_TLS_URL=url, TIDEWRIGHT_CA=certificate[0])
    assert "trust_certificate" in failure(url)
    assert "answered 501" in failure(url, SSL_CERT_FILE=certificate[0])  # it is no gateway, but trusted
    assert "begins with https://" in failure(f"http://localhost:{tls_port}")
