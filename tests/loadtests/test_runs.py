"""Load tests as a user runs them: with locust, over each protocol, in one process and in several, and interrupted."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.api_keys import add
from helpers.echo_replica import EchoReplica
from helpers.gateway import RunningGateway
from helpers.load_tests import PAUSE, load_test
from helpers.triton import RunningServer
from tidewright.bench.machine import free_ports
from tidewright_gateway.auth.stores import FileStore


@pytest.fixture(scope="module")
def gateway(model_dir: Path, server: RunningServer) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, server) as running:
        yield running


def test_each_protocol_against_the_real_server(gateway: RunningGateway, server: RunningServer, tmp_path: Path) -> None:
    protocols = ("--protocols", "http,websocket,grpc", "--grpc", server.grpc_url)
    done = load_test(
        tmp_path,
        "--url",
        gateway.url,
        *protocols,
        "--users",
        "3",
        "--shape",
        "steady",
        "--minutes",
        "0.1",
        "--scale",
        "0.01",
    )
    assert done.status == 0, done.words
    groups = done.report["groups"]["protocol"]
    assert groups.keys() == {"http", "websocket", "grpc"}
    for group in groups.values():
        assert group["failed"] == 0, done.report["errors"]
        assert group["served"] == group["requests"] > 0
        assert group["output_tokens"] >= group["served"]
        assert group["prompt_tokens"] >= group["served"]
        assert 0 < group["ttft_ms"]["p50"] <= group["e2e_ms"]["p50"]
    summary = done.report["summary"]
    assert summary["requests"] == sum(group["requests"] for group in groups.values())
    assert any("locust" in one["name"] for one in done.report["processes"])


def of_load_tests(replica: EchoReplica) -> list[int]:
    """Tokens in of each request but the gateway's own probes."""
    return [tokens for tokens, sampling in replica.requests if sampling.max_tokens > 1]


def test_requests_tokens_and_pace_are_those_of_the_server(
    paced_gateway: RunningGateway, paced: EchoReplica, tmp_path: Path
) -> None:
    before = len(of_load_tests(paced))
    done = load_test(
        tmp_path,
        "--url",
        paced_gateway.url,
        "--users",
        "2",
        "--requests",
        "20",
        "--fixed",
        "30:12",
        "--shape",
        "steady",
    )
    assert done.status == 0, done.words
    summary = done.report["summary"]
    assert summary["requests"] == summary["served"] == len(of_load_tests(paced)) - before == 20
    assert summary["output_tokens"] == 20 * 12
    assert summary["prompt_tokens"] == sum(of_load_tests(paced)[before:])
    assert summary["ttft_ms"]["p50"] >= 1000 * PAUSE
    assert (
        summary["tpot_ms"]["p50"] >= 1000 * PAUSE * 0.9
    )  # the clock starts when the first token has crossed the gateway
    assert summary["e2e_ms"]["p50"] >= 1000 * PAUSE * 12


def test_clients_that_leave_go_on_with_their_next_request(paced_gateway: RunningGateway, tmp_path: Path) -> None:
    load = ("--users", "2", "--requests", "14", "--fixed", "20:30", "--shape", "steady", "--minutes", "0.5")
    leave = ("--cancel-share", "1", "--protocols", "http,websocket")
    done = load_test(tmp_path, "--url", paced_gateway.url, *load, *leave)
    summary = done.report["summary"]
    assert done.report["errors"] == {}, done.words
    assert summary["requests"] == 14
    assert summary["cancelled"] >= 7  # but for those that left at the last token
    assert done.report["groups"]["protocol"].keys() == {"http", "websocket"}


def test_workers_here_and_elsewhere_share_the_load(
    paced_gateway: RunningGateway, paced: EchoReplica, tmp_path: Path
) -> None:
    """The one elsewhere gets all options from the master."""
    before = len(of_load_tests(paced))
    (port,) = free_ports(1)
    place = ("--bind-port", str(port))
    command = [sys.executable, "-m", "loadtests", "run", "--master-host", "127.0.0.1", *place]
    options = ("--users", "4", "--minutes", "0.07", "--shape", "steady", "--fixed", "20:10")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as elsewhere:
        workers = ("--workers", "1", "--expect-workers", "1", *place)
        done = load_test(tmp_path, "--url", paced_gateway.url, *options, *workers)
        assert done.status == 0, done.words
        _, words = elsewhere.communicate(timeout=60)
    assert elsewhere.returncode == 0, words
    assert done.report["summary"]["failed"] == 0, done.report["errors"]
    assert done.report["summary"]["requests"] == len(of_load_tests(paced)) - before > 4
    assert done.report["summary"]["output_tokens"] == 10 * done.report["summary"]["served"]
    assert sum("locust" in one["name"] for one in done.report["processes"]) == 2  # a master and its worker


def test_tenants_are_told_apart(model_dir: Path, paced: EchoReplica, tmp_path: Path) -> None:
    store, keys = tmp_path / "keys.yaml", tmp_path / "keys.txt"
    keys.write_text("".join(f"{add(FileStore(store), name)}\n" for name in ("a", "b")))
    with RunningGateway(model_dir, paced, keys=store) as gateway:
        url = ("--url", gateway.url, "--keys-file", str(keys))
        # They think between requests, or a busy machine's limit would be that of the flood.
        shape = ("--shape", "multi-tenant", "--users", "10", "--minutes", "0.1", "--fixed", "10:4", "--think", "0.1")
        done = load_test(tmp_path / "one", *url, *shape)
        refused = load_test(tmp_path / "two", "--url", gateway.url, "--key", "wrong")
    assert done.status == 0, done.words
    assert done.report["groups"]["tenant"].keys() == {"tenant 1", "tenant 2"} == done.report["peak"].keys()
    flood, quiet = (done.report["peak"][name] for name in ("tenant 1", "tenant 2"))
    assert flood["peak"]["requests"] > 3 * flood["before"]["requests"] > 0
    assert quiet["peak"]["requests"] < flood["peak"]["requests"]
    assert not any(line in json.dumps(done.report) + done.page for line in keys.read_text().split())
    assert refused.status == 1
    assert "refuses the key" in refused.words


def test_ctrl_c_ends_the_test_and_still_reports(paced_gateway: RunningGateway, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests", "run", "--url", paced_gateway.url, "--minutes", "60"]
    command += ["--fixed", "10:20", "--output", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr
        for line in process.stderr:
            if " requests  " in line:  # of the progress: some are done
                process.send_signal(signal.SIGINT)
                break
        words = process.stderr.read()
        assert process.wait(60) == 0, words
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["interrupted"]
    assert report["summary"]["requests"] > 0
    assert report["summary"]["failed"] == 0
    assert "stopped before its end" in (tmp_path / "report.html").read_text()
    assert "Traceback" not in words


@contextmanager
def speaks_something_else() -> Iterator[str]:
    """A port whose owner greets, as SSH does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=greet, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def refused_at(tmp_path: Path, *options: str) -> str:
    done = load_test(tmp_path, *options, "--minutes", "1")
    assert done.status == 1, done.words
    assert "Traceback" not in done.words
    (line,) = [line for line in done.words.splitlines() if line.startswith("Error: ")]
    assert not done.report
    return line


def test_a_target_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "nothing answers at" in refused_at(tmp_path, "--url", f"http://127.0.0.1:{port}")
    assert "no Triton answers" in refused_at(
        tmp_path, "--url", "http://x", "--protocols", "grpc", "--grpc", f"127.0.0.1:{port}"
    )


def test_what_is_no_gateway_is_one_line(paced_gateway: RunningGateway, paced: EchoReplica, tmp_path: Path) -> None:
    with speaks_something_else() as address:
        assert "does not speak HTTP" in refused_at(tmp_path, "--url", f"http://{address}")
        grpc = ("--protocols", "grpc", "--grpc", address)
        assert "no Triton answers" in refused_at(tmp_path, "--url", "http://x", *grpc)
    assert "does not speak HTTP" in refused_at(tmp_path, "--url", f"http://{paced.grpc_url}")
    assert "must be like http://" in refused_at(tmp_path, "--url", paced.grpc_url)
    assert "does not serve 'another'" in refused_at(tmp_path, "--url", paced_gateway.url, "--model", "another")
    assert "TLS failed" in refused_at(tmp_path, "--url", paced_gateway.url.replace("http:", "https:"))


def test_a_server_that_goes_away_ends_the_test(model_dir: Path, tmp_path: Path) -> None:
    """With a line that says so, in place of failures without end."""
    with EchoReplica() as replica:
        replica.pause = PAUSE
        gateway = RunningGateway(model_dir, replica)
        with gateway:
            command = [sys.executable, "-m", "loadtests", "run", "--url", gateway.url, "--minutes", "60"]
            command += ["--fixed", "10:10", "--output", str(tmp_path), "--give-up", "2"]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
            assert process.stderr
            for line in process.stderr:
                if " requests  " in line:
                    break
        began = time.monotonic()
        words = process.stderr.read()
        assert process.wait(60) == 1
    assert "every request failed" in words
    assert "Traceback" not in words
    assert time.monotonic() - began < 60
    assert json.loads((tmp_path / "report.json").read_text())["summary"]["failed"] >= 20
