"""The command `tidewright gateway`: its options, its start and its end, ports, workers, certificates."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from gateway.test_keys_command import write_certificate
from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from tidewright.bench.machine import free_ports

COMMAND = str(Path(sys.executable).with_name("tidewright"))
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@contextmanager
def taken_port() -> Iterator[int]:
    with closing(socket.socket()) as other:
        (port,) = free_ports(1)
        other.bind(("127.0.0.1", port))
        other.listen()
        yield port


def command(model_dir: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`tidewright gateway`, to its end."""
    words = [COMMAND, "gateway", "--model", str(model_dir), *options]
    return subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_port_in_use_is_one_line(model_dir: Path, workers: int) -> None:
    with taken_port() as port:
        done = command(model_dir, "--port", str(port), "--workers", str(workers))
    assert done.returncode == 1
    said = f"Error: 127.0.0.1:{port}: Address already in use; choose another with --port"
    assert done.stderr.strip().splitlines() == [said]


def test_a_file_that_is_wrong_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    for text, said in (
        ("server: {modle: a}", "there is no option modle in server; did you mean model?"),
        ("server: [", "not YAML"),
    ):
        file.write_text(text)
        done = command(model_dir, "--config", str(file))
        assert (done.returncode, said in done.stderr, done.stderr.count("\n")) == (1, True, 1), done.stderr
        assert str(file) in done.stderr


def test_it_prints_its_options_and_reads_them(model_dir: Path, tmp_path: Path) -> None:
    done = command(model_dir, "--print-config", "--max-queue", "7")
    assert done.returncode == 0
    assert "  max_queue: 7\n" in done.stdout
    assert done.stdout.startswith("version: 1\nserver:\n")
    (tmp_path / "gateway.yaml").write_text(done.stdout)
    again = command(model_dir, "--print-config", "--config", str(tmp_path / "gateway.yaml"))
    assert again.stdout == done.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_is_a_clean_end(model_dir: Path, echo: EchoReplica, workers: int) -> None:
    (port,) = free_ports(1)
    words = [COMMAND, "gateway", "--model", str(model_dir), "--port", str(port), "--replicas", echo.grpc_url]
    with subprocess.Popen([*words, "--workers", str(workers)], stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not answers(port):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Abort" not in said
    assert "Traceback" not in said


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_it_says_where_it_listens_and_how_its_replicas_are(model_dir: Path, echo: EchoReplica) -> None:
    port, nobody = free_ports(2)
    words = [COMMAND, "gateway", "--model", str(model_dir), "--port", str(port)]
    words += ["--served-model-name", MODEL, "--replicas", f"{echo.grpc_url},127.0.0.1:{nobody}"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            lines: list[str] = []
            while len(lines) < 3:
                line = process.stderr.readline()
                assert line
                if "WARNING" not in line and " INFO gateway[" not in line:
                    lines.append(line.rstrip())
        finally:
            process.terminate()
    assert lines[0] == (
        f"The gateway listens on http://127.0.0.1:{port}/v1 (OpenAI's API, model {MODEL}, without a key)"
    )
    assert lines[1] == f"  replica {echo.grpc_url}: healthy"
    assert f"  replica 127.0.0.1:{nobody}: " in lines[2]
    assert "refused" in lines[2]


def test_workers_start_however_long_the_temporary_folder_is(
    model_dir: Path, echo: EchoReplica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("a" * 120)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with RunningGateway(model_dir, echo, workers=2, limit_concurrent=5) as gateway:
        assert gateway.post("/v1/chat/completions", CHAT).status_code == 200


def test_one_connection_too_many_is_told_so(model_dir: Path, echo: EchoReplica) -> None:
    with RunningGateway(model_dir, echo, max_connections=3) as gateway:
        gateway.http.close()
        held = []
        deadline = time.monotonic() + 30
        while len(held) < 3:  # the one of the test itself goes away first
            connection = socket.create_connection(("127.0.0.1", gateway.port))
            connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
            answer = connection.recv(65536)
            if b" 200 " in answer:
                held.append(connection)
            else:
                connection.close()
            assert time.monotonic() < deadline
        with closing(socket.create_connection(("127.0.0.1", gateway.port))) as extra:
            answer = b""
            while data := extra.recv(65536):
                answer += data
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"too_many_connections" in answer
        held.pop().close()
        while True:
            try:
                ok = httpx.get(f"{gateway.url}/health/live", trust_env=False)
                if ok.status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline
        for connection in held:
            connection.close()
        gateway.http = httpx.Client()


def test_a_renewed_certificate_is_used_without_a_restart(
    model_dir: Path, tmp_path: Path, echo: EchoReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = write_certificate(tmp_path)
    (port,) = free_ports(1)
    code = (
        "from tidewright_gateway.http import certificates, serving\n"
        "from tidewright_gateway.config import GatewaySettings\n"
        "certificates.INTERVAL = 0.05\n"
        "serving.serve(GatewaySettings())\n"
    )
    options = {"MODEL": model_dir, "REPLICAS": echo.grpc_url, "PORT": port, "TLS_CERT": cert, "TLS_KEY": key}
    environment = os.environ | {f"TIDEWRIGHT_GATEWAY_{name}": str(value) for name, value in options.items()}
    deadline = time.monotonic() + 60

    def shown() -> str | None:
        try:
            return ssl.get_server_certificate(("127.0.0.1", port), timeout=10)
        except OSError:
            return None

    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        try:
            while not (first := shown()):
                assert time.monotonic() < deadline
            Path(cert).write_text("nonsense")
            time.sleep(0.2)  # several looks
            assert shown() == first
            write_certificate(tmp_path)
            while shown() in (first, None):
                assert time.monotonic() < deadline
        finally:
            process.terminate()


def test_replicas_are_reached_over_tls_with_a_certificate_of_the_gateway(model_dir: Path, tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path)
    with EchoReplica(certificate=(cert, key)) as replica:
        options = {"replica_tls": True, "replica_ca": cert, "replica_cert": cert, "replica_key": key}
        address = replica.grpc_url.replace("127.0.0.1", "localhost")
        with RunningGateway(model_dir, **options, replicas=address) as gateway:
            assert gateway.post("/v1/chat/completions", CHAT).status_code == 200
        for fewer in ({"replica_tls": True, "replica_ca": cert}, {"replica_tls": True}, {}):
            with RunningGateway(model_dir, **fewer, replicas=address, wait_for_replica=0.1) as gateway:
                assert gateway.post("/v1/chat/completions", CHAT).status_code == 503
