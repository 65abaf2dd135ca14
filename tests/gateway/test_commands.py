"""`tidewright chat`, `complete`, `health` and `drain` through a real gateway."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from gateway.test_keys_command import write_certificate
from helpers.api_keys import add
from helpers.echo_replica import EchoReplica
from helpers.gateway import RunningGateway
from launch.test_client_commands import Conversation
from tidewright.bench.machine import free_ports
from tidewright.launch import gateway_control
from tidewright.launch.cli import main
from tidewright_gateway.auth.callers import Limits, Role
from tidewright_gateway.auth.stores import FileStore


def run(url: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [*arguments, "--url", url], env={"TIDEWRIGHT_KEY": None, **environment})
    return result.exit_code, result.stdout, result.stderr


@contextlib.contextmanager
def refusing(body: bytes) -> Iterator[str]:
    """A server that answers everything with 404 and this body; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(404)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the base class's name

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Guarded:
    """A gateway that requires keys."""

    def __init__(self, gateway: RunningGateway, folder: Path, keys: dict[str, str]) -> None:
        self.url, self.port, self.folder, self.keys = gateway.url, gateway.port, folder, keys

    def file(self, name: str) -> str:
        path = self.folder / f"{name}.key"
        path.write_text(self.keys[name] + "\n")
        return str(path)


@pytest.fixture(scope="module")
def guarded(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    store = FileStore(folder / "keys.yaml")
    keys = {
        "alice": add(store, "alice"),
        "ops": add(store, "ops", role=Role.ADMIN),
        "slow": add(store, "slow", limits=Limits(requests_per_second=0.01)),
        "short": add(store, "short", limits=Limits(tokens_per_minute=40)),
    }
    with EchoReplica(limit=50) as replica, RunningGateway(model_dir, replica, keys=folder / "keys.yaml") as gateway:
        yield Guarded(gateway, folder, keys)


def test_chat_and_complete_stream_what_the_gateway_sends(echo: EchoReplica, echo_gateway: RunningGateway) -> None:
    options = ("--max-tokens", "4", "--seed", "7", "--stop", "zzz", "--top-p", "0.5", "--temperature", "0.2")
    for command in ("chat", "complete"):
        assert run(echo_gateway.url, command, "Hi", *options) == (0, " word" * 4 + "\n", "")
        sampling = echo.requests[-1][1]
        assert (sampling.max_tokens, sampling.seed, sampling.stop) == (4, 7, ["zzz"])
        assert (sampling.top_p, sampling.temperature) == (0.5, 0.2)


@pytest.mark.parametrize("command", ["chat", "complete", "health", "drain"])
def test_help_shows_how_to_go_through_a_gateway(command: str) -> None:
    shown = CliRunner().invoke(main, [command, "--help"]).output
    assert f"tidewright {command} --url https://gateway.example:8080 --key-file " in shown
    assert "TIDEWRIGHT_KEY" in shown


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "http://127.0.0.1:{}/", "http://localhost:{}/v1", "127.0.0.1:{}/v1/"])
def test_the_address_may_be_written_as_people_write_it(echo_gateway: RunningGateway, form: str) -> None:
    url = form.format(echo_gateway.port)
    assert run(url, "chat", "Hi", "--max-tokens", "1") == (0, " word\n", "")
    assert run(url, "health") == (0, "healthy\n", "")


def test_a_conversation_sends_its_history(echo: EchoReplica, echo_gateway: RunningGateway) -> None:
    talk = Conversation(echo_gateway)
    lengths = []
    for _ in range(3):
        talk.see(b"> ")
        talk.type(b"hallo\n")
        talk.see(b" word word")
        lengths.append(echo.requests[-1][0])
    talk.see(b"> ")
    talk.type(b"\x04")
    assert talk.exit_code() == 0
    # Each question comes with all questions and answers before it.
    assert lengths[2] - lengths[1] == lengths[1] - lengths[0] > 50


def test_a_key_comes_from_a_flag_a_file_or_the_environment(guarded: Guarded) -> None:
    key, url = guarded.keys["alice"], guarded.url
    ask = ("chat", "Hi", "--max-tokens", "1")
    said = (0, " word\n", "")
    assert run(url, *ask, "--key", key) == said
    assert run(url, *ask, "--key-file", guarded.file("alice")) == said
    assert run(url, *ask, TIDEWRIGHT_KEY=key) == said
    assert run(url, *ask, "--key-file", guarded.file("alice"), TIDEWRIGHT_KEY="tw-wrong-x") == said
    assert run(url, *ask, "--key", key, TIDEWRIGHT_KEY="tw-wrong-x") == said


def test_a_key_that_can_not_be_used_is_one_line_without_it(guarded: Guarded, tmp_path: Path) -> None:
    url, secret = guarded.url, "tw-eve-secret"
    (tmp_path / "two").write_text(f"{secret}\n{secret}\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    file = guarded.file("alice")
    for code, arguments in (
        (1, ("--key-file", str(tmp_path / "none"))),
        (1, ("--key-file", str(tmp_path))),
        (1, ("--key-file", str(tmp_path / "two"))),
        (1, ("--key-file", str(tmp_path / "empty"))),
        (1, ("--key-file", str(tmp_path / "bytes"))),
        (1, ("--key", f"{secret}\u00e9")),
        (1, ("--key", "")),
        (2, ("--key", secret, "--key-file", file)),
    ):
        for command in (("chat", "Hi"), ("health",), ("drain",)):
            got, _, said = run(url, *command, *arguments)
            assert (got, secret in said, "Error: " in said) == (code, False, True), (arguments, said)
            assert code == 2 or said.count("\n") == 1


def test_a_missing_or_wrong_key_says_what_to_do(guarded: Guarded) -> None:
    wrong = ("--key", "tw-alice-wrong")
    for command in (("chat", "Hi"), ("complete", "Hi"), ("drain",)):
        code, _, said = run(guarded.url, *command)
        assert (code, said) == (
            1,
            f"Error: {guarded.url} requires an API key; give one with --key-file, or in TIDEWRIGHT_KEY\n",
        )
        code, _, said = run(guarded.url, *command, *wrong)
        assert (code, said) == (1, f"Error: {guarded.url} refuses the API key: invalid API key or token\n")


def test_draining_takes_an_admin(guarded: Guarded) -> None:
    code, out, said = run(guarded.url, "drain", "--key-file", guarded.file("alice"))
    assert (code, out, said) == (1, "", "Error: this requires a key with the role admin\n")


def test_a_limit_says_when_to_try_again(guarded: Guarded) -> None:
    ask = ("chat", "Hi", "--max-tokens", "1", "--key-file", guarded.file("slow"))
    assert run(guarded.url, *ask)[0] == 0
    code, _, said = run(guarded.url, *ask)
    assert code == 1
    assert "slow has used up its" in said
    assert said.count("try again in") == said.count("\n") == 1
    code, out, said = run(guarded.url, "complete", "Hi", "--key-file", guarded.file("short"))
    assert (code, out) == (1, "")
    assert "lower max_tokens" in said


@pytest.mark.parametrize("command", [("chat", "Hi"), ("complete", "Hi"), ("health",), ("drain",)])
def test_no_server_and_another_kind_of_server_are_one_line(command: tuple[str, ...]) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    code, _, said = run(nobody, *command)
    assert (code, said.count("\n"), nobody in said, "refused" in said) == (1, 1, True, True)

    for body in (b"<html>", b'{"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}'):
        with refusing(body) as url:
            code, out, said = run(url, *command)
        assert (code, out, said.count("\n")) == (1, "", 1)
        assert "answered with status 404; is it a Tidewright server?" in said


def test_tls_is_verified_against_the_ca_that_is_named(model_dir: Path, echo: EchoReplica, tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path)
    gateway = RunningGateway(model_dir, echo, tls_cert=cert, tls_key=key)
    gateway.is_live = lambda: run(url, "health", SSL_CERT_FILE=cert)[0] == 0  # type: ignore[method-assign]
    url = f"https://localhost:{gateway.port}"
    with gateway:
        for command in (("chat", "Hi", "--max-tokens", "1"), ("health",)):
            assert run(url, *command, SSL_CERT_FILE=cert)[0] == 0
            code, _, said = run(url, *command)
            assert (code, "SSL_CERT_FILE" in said, said.count("\n")) == (1, True, 1), said
            code, _, said = run(url.replace("https", "http"), *command)
            assert (code, "https://" in said, said.count("\n")) == (1, True, 1), said


def test_health_names_the_replicas_in_trouble(model_dir: Path, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "keys.yaml")
    user, admin = add(store, "alice"), add(store, "ops", role=Role.ADMIN)
    with EchoReplica() as first, EchoReplica() as second:
        options = {"keys": tmp_path / "keys.yaml", "generation_probe_interval": 0}
        with RunningGateway(model_dir, first, second, **options) as gateway:
            url = gateway.url
            assert run(url, "health") == (0, "healthy\n", "")
            first.status = msgspec.structs.replace(first.status, draining=True)
            deadline = time.monotonic() + 30
            while not (got := run(url, "health", "--key", admin))[2]:
                assert time.monotonic() < deadline
            assert got == (0, "healthy\n", f"{first.grpc_url}: draining\n")
            unnamed = (0, "healthy\n", "replicas that take no requests: 1\n")
            assert run(url, "health", "--key", user) == run(url, "health") == unnamed
            second.status = msgspec.structs.replace(second.status, trouble="the engine is not available")
            while (got := run(url, "health", TIDEWRIGHT_KEY=admin))[0] == 0:
                assert time.monotonic() < deadline
            troubles = f"{first.grpc_url}: draining; {second.grpc_url}: the engine is not available"
            assert got == (1, "", f"Error: no replica can take requests; try again in 1 s; {troubles}\n")
            assert run(url, "health") == (1, "", "Error: no replica can take requests; try again in 1 s\n")


def test_drain_through_a_gateway_ends_one_replica_and_waits(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_control, "SETTLED", 0.5)
    with EchoReplica() as first, EchoReplica() as second:
        with RunningGateway(model_dir, first, second, generation_probe_interval=0) as gateway:
            url = gateway.url
            code, _, said = run(url, "drain")
            assert (code, first.grpc_url in said, second.grpc_url in said) == (1, True, True)
            code, _, said = run(url, "drain", "--replica", "10.0.0.1:1")
            assert (code, "there is no replica" in said) == (1, True)
            begun = f"Draining {first.grpc_url}.\n"
            assert run(url, "drain", "--replica", first.grpc_url, "--no-wait") == (0, begun, "")
            assert (first.status.draining, second.status.draining) == (True, False)
            ended: list[tuple[int, str, str]] = []
            waiting = threading.Thread(target=lambda: ended.append(run(url, "drain", "--replica", first.grpc_url)))
            waiting.start()
            waiting.join(1.5)
            assert waiting.is_alive()  # it still drains
            first._server.stop(0)
            waiting.join(30)
            assert ended == [(0, begun, "")]
            assert run(url, "health")[0] == 0


def test_a_drain_ends_with_a_gateway_that_ends_too(model_dir: Path) -> None:
    with EchoReplica() as replica, RunningGateway(model_dir, replica) as gateway:
        ended: list[tuple[int, str, str]] = []
        waiting = threading.Thread(target=lambda: ended.append(run(gateway.url, "drain")))
        waiting.start()
        while not replica.status.draining:
            time.sleep(0.01)
        gateway.process.terminate()
        waiting.join(30)
        assert ended == [(0, f"Draining {replica.grpc_url}.\n", "")]


def test_a_triton_is_not_asked_to_drain_a_replica() -> None:
    with refusing(b'{"error":"Not Found"}') as url:
        code, _, said = run(url, "drain", "--replica", "10.0.0.1:8001")
    assert (code, "is for gateways" in said) == (2, True)
