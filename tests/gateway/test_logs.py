"""The logs of a real gateway: a line for every request, files that can't be written, and the pipeline."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from benchmarks.bulk_sink import BulkSink
from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from helpers.rsyslog import RunningRsyslog
from tidewright.bench.machine import free_ports
from tidewright.logs import FIELDS
from tidewright_gateway.auth.keys import KeyEntry, make_key
from tidewright_gateway.auth.stores import open_store
from tidewright_gateway.http import access_log

SECRET = "unspeakable"  # of prompts and answers
PAGE = "http://page.example"


class World:
    def __init__(self, gateway: RunningGateway, replica: EchoReplica, folder: Path, key: str) -> None:
        self.gateway, self.replica, self.folder, self.key = gateway, replica, folder, key
        self.headers = {"Authorization": f"Bearer {key}"}

    def read(self, name: str = "access.log") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def logged(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The only line of the access log that fits, which is written behind its answer."""
        deadline = time.monotonic() + 30
        while not (found := [line for line in self.read() if fits(line)]):
            assert time.monotonic() < deadline, self.read()[-3:]
            time.sleep(0.02)
        assert len(found) == 1
        return found[0]

    def raw(self, data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.gateway.port)) as connection:
            connection.sendall(data)
            return connection.recv(4096)


@pytest.fixture(scope="module")
def world(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("logs")
    key, hashed = make_key("me")
    open_store(str(folder / "keys.yaml")).change("me", lambda _: KeyEntry("me", (hashed,)))
    options = {
        "keys": folder / "keys.yaml",
        "access_log": folder / "access.log",
        "log_file": folder / "gateway.log",
        "log_format": "json",
        "log_level": "debug",
        "read_timeout": 1,
        "max_body": 2048,
        "max_running": 1,
        "max_queue": 0,
        "cors_origins": PAGE,
        "retry_max_attempts": 1,
    }
    with EchoReplica(text=f" {SECRET}") as replica, RunningGateway(model_dir, replica, **options) as gateway:
        yield World(gateway, replica, folder, key)


@pytest.mark.parametrize(
    ("path", "options", "status", "error"),
    [
        ("/v1/completions", {"headers": {"Authorization": "Bearer tw-me-wrong"}}, 401, "invalid_api_key"),
        ("/no/such", {}, 404, "no_such_path"),
        ("/v1/completions", {"json": {"model": "other", "prompt": SECRET}}, 404, "model_not_found"),
        ("/v1/completions", {"content": b"x" * 3000}, 413, "body_too_large"),
        ("/v1/completions", {"headers": {"Content-Type": "text/plain"}}, 415, "not_json"),
        ("/v1/completions", {"content": b"{"}, 400, "invalid_json"),
        ("/v1/completions", {"json": {"model": MODEL, "prompt": SECRET, "n": 0}}, 400, "invalid_value"),
    ],
)
def test_a_refused_request_has_a_line(
    world: World, path: str, options: dict[str, Any], status: int, error: str
) -> None:
    name = f"{status}-{error}"
    headers = {"X-Request-Id": name, "Content-Type": "application/json", **world.headers, **options.get("headers", {})}
    answer = world.gateway.http.post(path, **{**options, "headers": headers})
    assert answer.status_code == status
    line = world.logged(lambda line: line.get("request_id") == name)
    assert (line["event"], line["status"], line["error"]) == ("request_refused", status, error)
    assert (line["client"], line["path"], line["method"]) == ("127.0.0.1", path, "POST")
    assert line.get("key_id") == ("me" if status in (400, 404) else None)  # not known yet
    assert line.get("limited_by") == {413: "max_body"}.get(status)
    assert line.get("model") == {"model_not_found": "other", "invalid_value": MODEL}.get(error)


def test_one_that_finds_no_place_says_which_limit(world: World) -> None:
    world.replica.go_on.clear()
    body = {"model": MODEL, "prompt": SECRET}
    with ThreadPoolExecutor() as pool:
        try:
            job = pool.submit(world.gateway.http.post, "/v1/completions", json=body, headers=world.headers)
            assert world.replica.wait_running(1, 30)
            refused = world.gateway.http.post("/v1/completions", json=body, headers=world.headers)
        finally:
            world.replica.go_on.set()
        assert job.result().status_code == 200
    line = world.logged(lambda line: line.get("request_id") == refused.headers["X-Request-Id"])
    assert (line["status"], line["limited_by"]) == (503, "max_queue")


@pytest.mark.parametrize(
    ("data", "status", "error", "path"),
    [
        (b"NONSENSE\r\n\r\n", 400, "invalid_http", ""),
        (b"GET /long?secret HTTP/1.1\r\nA: " + b"x" * 70_000 + b"\r\n\r\n", 431, "headers_too_large", "/long"),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"X-Request-Id: never-sent\r\nAuthorization: KEY\r\nContent-Length: 9\r\n\r\n{",
            408,
            "timeout",
            "/v1/completions",
        ),
    ],
)
def test_what_is_no_whole_request_has_one_line_too(
    world: World, data: bytes, status: int, error: str, path: str
) -> None:
    data = data.replace(b"KEY", world.headers["Authorization"].encode())
    assert world.raw(data).startswith(f"HTTP/1.1 {status}".encode())
    line = world.logged(lambda line: line["status"] == status and line.get("error") == error)
    assert (line["event"], line["client"], line["path"]) == ("request_refused", "127.0.0.1", path)


def test_a_preflight_has_a_line(world: World) -> None:
    headers = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    assert world.gateway.http.options("/v1/chat/completions", headers=headers).status_code == 200
    line = world.logged(lambda line: line["method"] == "OPTIONS")
    assert (line["status"], line["path"]) == (200, "/v1/chat/completions")


@pytest.mark.parametrize(("path", "error"), [("/v1/other", None), ("/v1/stream", "cross_site")])
def test_a_refused_handshake_has_a_line(world: World, path: str, error: str | None) -> None:
    with pytest.raises(WebSocketException):
        connect(f"ws://127.0.0.1:{world.gateway.port}{path}", origin="http://evil.example")  # type: ignore[arg-type]
    line = world.logged(lambda line: line["path"] == path and line["method"] == "GET" and line["status"] == 403)
    assert (line["event"], line.get("error")) == ("request_refused", error)


def test_what_comes_over_a_websocket_has_lines(world: World) -> None:
    with connect(f"ws://127.0.0.1:{world.gateway.port}/v1/stream") as socket:
        socket.send(json.dumps({"type": "open", "token": "tw-me-wrong"}))
        assert "invalid_api_key" in str(socket.recv(30))
        socket.send(json.dumps({"type": "open", "token": world.key}))
        assert "opened" in str(socket.recv(30))
        for id, model in (("a", MODEL), ("b", "other")):
            request = {"model": model, "prompt": SECRET, "max_tokens": 2}
            socket.send(json.dumps({"type": "generate", "id": id, "request": request}))
            while "done" not in str(socket.recv(30)):
                pass
        socket.send(json.dumps({"type": "cancel", "id": "c"}))
        assert "unknown_id" in str(socket.recv(30))
    whole = world.logged(lambda line: line["status"] == 101)
    assert (whole["event"], whole["key_id"], whole["client"]) == ("request", "me", "127.0.0.1")
    lines = [line for line in world.read() if line["method"] == "WEBSOCKET"]
    found = {(line["status"], line.get("error"), line.get("key_id"), line.get("completion_tokens")) for line in lines}
    assert found == {
        (401, "invalid_api_key", None, None),
        (200, None, "me", 2),
        (404, "model_not_found", "me", None),
        (404, "unknown_id", "me", None),
    }
    assert all(line["client"] == "127.0.0.1" for line in lines)


def test_values_are_bounded_and_break_no_line(world: World) -> None:
    path = '/"\\%0A%00' + "x" * 10_000
    answer = world.gateway.http.get(path, headers={**world.headers, "X-Forwarded-For": "6.6.6.6"})
    line = world.logged(lambda line: line.get("request_id") == answer.headers["X-Request-Id"])
    assert len(line["path"]) <= 256
    assert line["path"].startswith('/"\\\n\0xxx')
    assert line["client"] == "127.0.0.1"
    key, _ = make_key("lost")
    answer = world.gateway.http.get(f"/v1/{key}", headers=world.headers)
    assert (
        world.logged(lambda line: line.get("request_id") == answer.headers["X-Request-Id"])["path"] == "/v1/tw-lost-***"
    )


def test_an_attempt_that_failed_is_logged_with_what_it_belongs_to(world: World) -> None:
    world.replica.errors = {"decoder": "broken [engine_failed]"}
    try:
        answer = world.gateway.http.post(
            "/v1/completions",
            json={"model": MODEL, "prompt": SECRET},
            headers={**world.headers, "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-00"},
        )
    finally:
        world.replica.errors = {}
    assert answer.status_code == 503
    (line,) = [line for line in world.read("gateway.log") if line["event"] == "attempt_failed"]
    assert line["request_id"] == f"{answer.headers['X-Request-Id']}-0"
    assert (line["level"], line["replica"]) == ("warning", world.replica.grpc_url)
    assert (line["trace_id"], line["key_id"]) == ("ab" * 16, "me")


def test_a_refusal_for_load_is_no_warning(world: World) -> None:
    world.replica.errors = {"decoder": "1 request waits [overloaded]"}
    try:
        answer = world.gateway.http.post(
            "/v1/completions", json={"model": MODEL, "prompt": SECRET}, headers=world.headers
        )
    finally:
        world.replica.errors = {}
    assert answer.status_code == 503
    asked = f"{answer.headers['X-Request-Id']}-0"
    lines = [line for line in world.read("gateway.log") if line["event"] == "attempt_failed"]
    lines = [line for line in lines if line["request_id"] == asked]
    assert {line["level"] for line in lines} == {"info"}
    assert all(" refused: 1 request waits" in line["message"] for line in lines)


def test_at_debug_no_prompt_answer_or_key_is_written_and_all_fields_are_documented(world: World) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 3}
    for stream in (False, True):
        answer = world.gateway.http.post("/v1/chat/completions", json={**body, "stream": stream}, headers=world.headers)
        assert SECRET in answer.text
        world.logged(lambda line, answer=answer: line.get("request_id") == answer.headers["X-Request-Id"])  # type: ignore[misc]
    for name in ("gateway.log", "access.log"):
        text = (world.folder / name).read_text()
        assert SECRET not in text
        assert world.key[-43:] not in text
    assert set().union(*world.read()) <= FIELDS.keys() | access_log.FIELDS.keys()


def test_a_trusted_proxy_says_who_the_client_is(model_dir: Path, tmp_path: Path) -> None:
    options = {"access_log": tmp_path / "access.log", "trusted_proxies": "127.0.0.0/8"}
    with EchoReplica() as replica, RunningGateway(model_dir, replica, **options) as gateway:
        for value in ("6.6.6.6, 7.7.7.7", "x" * 5000):
            gateway.http.get("/v1/models", headers={"X-Forwarded-For": value})
    lines = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
    assert [line["client"] for line in lines if line["path"] == "/v1/models"] == ["7.7.7.7", "x" * 64]


def test_a_full_disk_harms_no_request_and_lost_lines_are_counted(model_dir: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("access.log", "gateway.log")]
    for file in files:
        file.symlink_to("/dev/full")
    options = {"access_log": files[0], "log_file": files[1], "log_format": "json"}
    with EchoReplica() as replica, RunningGateway(model_dir, replica, **options) as gateway:
        before = gateway.metric("log_lines_dropped_total")
        for _ in range(50):
            assert gateway.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2}).status_code == 200
        reads = 0  # each has a line as well; a line comes behind its answer
        while gateway.metric("log_lines_dropped_total") < before + 50 + reads:
            reads += 1
            time.sleep(0.05)
        # Its line comes behind its answer, and may find room already; that of the request before it is dropped by now.
        assert gateway.http.get("/version").status_code == 200
        for file in files:
            file.unlink()  # as if there were room again
        assert gateway.http.get("/version").status_code == 200
        assert gateway.http.get("/version").status_code == 200
    found = [json.loads(line) for line in files[0].read_text().splitlines()]
    (told,) = (line for line in found if line["event"] == "log_lines_dropped")
    assert told["lines"] >= 50
    assert {line["path"] for line in found if line is not told} == {"/version"}


@pytest.mark.parametrize("option", ["log_file", "access_log"])
@pytest.mark.parametrize("command", [["-m", "tidewright_gateway"], ["-m", "tidewright.launch.cli", "gateway"]])
def test_a_file_that_can_not_be_written_is_one_clear_line(
    model_dir: Path, tmp_path: Path, option: str, command: list[str]
) -> None:
    gateway = RunningGateway(model_dir, **{"replicas": "127.0.0.1:1", option: tmp_path / "none" / "it.log"})
    if "gateway" in command:
        command = ["-c", "from tidewright.launch.cli import main; main()", "gateway"]
    ended = subprocess.run(
        [sys.executable, *command], env=gateway._environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert ended.stderr == f"Error: {option}: can't write {tmp_path}/none/it.log: No such file or directory\n"


def test_every_line_reaches_the_sink_as_written_also_over_its_restart(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    files = [folder / "access.log", folder / "gateway.log"]
    options = {"access_log": files[0], "log_file": files[1], "log_format": "json", "log_level": "debug", "workers": 2}
    sink = BulkSink(*free_ports(1))
    with sink, RunningRsyslog(tmp_path, folder, sink.port) as rsyslog:
        assert rsyslog.check().returncode == 0, rsyslog.check().stderr
        with EchoReplica() as replica, RunningGateway(model_dir, replica, **options) as gateway:

            def ask(times: int) -> None:
                for number in range(times):
                    gateway.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2})
                    gateway.http.get(f'/"ü\\%0A{number}')

            ask(50)
            sink.stop()
            ask(50)
            files[0].rename(folder / "access.1")
            ask(20)
            sink.start()
            ask(50)
        written = [line for file in (*files, folder / "access.1") for line in file.read_text().splitlines()]
        assert len(written) > 340
        deadline = time.monotonic() + 60
        while len(sink.documents) < len(written):
            assert time.monotonic() < deadline, (len(sink.documents), len(written))
            time.sleep(0.05)
    assert sorted(sink.lines) == sorted(written)


@pytest.mark.parametrize("sink", ["loki", "elasticsearch"])
def test_the_configuration_of_vector_is_whole(sink: str) -> None:
    """As far as it can be seen without one: every input is there, and each sink waits on disk."""
    folder = Path(__file__).parent.parent.parent / "monitoring" / "logs" / "vector"
    config = yaml.safe_load((folder / "tidewright.yaml").read_text())
    config |= yaml.safe_load((folder / f"{sink}.yaml").read_text())
    made = {*config["sources"], *config["transforms"]}
    inputs = [one for kind in ("transforms", "sinks") for part in config[kind].values() for one in part["inputs"]]
    assert set(inputs) == made
    assert {part["buffer"]["type"] for part in config["sinks"].values()} == {"disk"}


@pytest.mark.parametrize(("level", "has_all"), [("info", False), ("debug", True)])
def test_scrapes_and_health_checks_that_go_well_are_lines_at_debug_only(
    model_dir: Path, tmp_path: Path, level: str, has_all: bool
) -> None:
    key, hashed = make_key("me")
    open_store(str(tmp_path / "keys.yaml")).change("me", lambda _: KeyEntry("me", (hashed,)))
    options = {"access_log": tmp_path / "access.log", "log_level": level, "keys": tmp_path / "keys.yaml"}
    paths = ("/health", "/health/live", "/health/ready/")
    with EchoReplica() as replica, RunningGateway(model_dir, replica, **options) as gateway:
        headers = {"Authorization": f"Bearer {key}"}
        while gateway.http.get("/health").status_code != 200:  # until it knows its replica
            time.sleep(0.05)
        assert [gateway.http.get(path).status_code for path in paths] == [200, 200, 200]
        refused = gateway.http.get("/metrics", headers=headers)
        assert refused.status_code == 403  # it is no admin's
        assert gateway.http.get("/v1/models", headers=headers).status_code == 200
    lines = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
    of_level = {line["level"]: {one["path"] for one in lines if one["level"] == line["level"]} for line in lines}
    assert {"/metrics", "/v1/models"} <= of_level["info"]
    assert of_level.get("debug", set()) == ({*paths} if has_all else set())
    (told,) = (line for line in lines if line["path"] == "/metrics")
    assert (told["event"], told["error"]) == ("request_refused", "admin_required")


def test_refusals_name_their_endpoint_their_id_and_no_key(model_dir: Path, tmp_path: Path) -> None:
    key = f"tw-alice-{'x' * 43}"
    with EchoReplica() as replica, RunningGateway(model_dir, replica, access_log=tmp_path / "access.log") as gateway:
        sent = {"X-Request-Id": key, "Content-Type": "text/plain"}
        refused = gateway.http.post("/v1/chat/completions", content=b"{}", headers=sent)
        assert refused.status_code == 415
        assert key not in str(refused.headers)
        assert gateway.metric("requests_total", path="/v1/chat/completions", code="not_json") == 1
        with socket.create_connection(("127.0.0.1", gateway.port)) as raw:
            raw.sendall(b"NONSENSE\r\n\r\n")
            answer = raw.makefile("rb").read().decode()
    text = (tmp_path / "access.log").read_text()
    lines = {line["error"]: line for line in map(json.loads, text.splitlines()) if "error" in line}
    assert key not in text
    assert lines["not_json"]["endpoint"] == "/v1/chat/completions"
    assert f"x-request-id: {lines['invalid_http']['request_id']}" in answer
    assert lines["invalid_http"]["message"][0] != " "
