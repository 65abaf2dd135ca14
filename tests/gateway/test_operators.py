"""What a new operator meets: odd addresses and methods, other names of headers, hosts, wrong models."""

from __future__ import annotations

import http.client
from contextlib import closing
from pathlib import Path

import httpx
import msgspec
import pytest

from helpers.api_keys import add
from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from tidewright.bench.machine import free_ports
from tidewright_gateway.auth.stores import FileStore

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/health", 200, None),
        ("GET", "/health/live/", 200, None),
        ("GET", "//v1//models", 200, None),
        ("GET", "/v1/models/", 200, None),
        ("GET", "/version", 200, None),
        ("HEAD", "/health", 200, None),
        ("HEAD", "/v1/models", 200, None),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/nowhere/", 404, "no_such_path"),
        ("GET", "//evil.example/x/", 404, "no_such_path"),
        ("GET", "/v1/stream", 426, "upgrade_required"),
        ("HEAD", "/v1/stream/", 426, "upgrade_required"),
        ("POST", "/v1/stream", 426, "upgrade_required"),
        ("POST", "/v1/responses/input_tokens", 404, "unsupported"),
        ("POST", "/v1/responses/compact/", 404, "unsupported"),
        ("POST", "/v1/responses/resp_1", 405, "method_not_allowed"),
        ("GET", "/v1/responses/compact", 404, "response_not_found"),
        ("GET", "/v1/models?limit=5", 200, None),
        ("GET", "/v1/models?limit=0", 400, "invalid_value"),
        ("GET", "/v1/models?surprise=1", 400, "unknown_parameter"),
        ("GET", "/v1/models?beta=true", 400, "unknown_parameter"),
        ("GET", f"/v1/models/{MODEL}?surprise", 400, "unknown_parameter"),
        ("GET", "/v1/responses/resp_1?include[]=a&include=b", 404, "response_not_found"),
        ("GET", "/v1/responses/resp_1?after=a", 400, "unknown_parameter"),
        ("GET", "/v1/responses/resp_1/input_items?limit=0", 400, "invalid_value"),
        ("GET", "/v1/responses/resp_1/input_items?limit=1&order=asc&after=x", 404, "response_not_found"),
        ("GET", "/v1/models?" + "a=1&" * 101, 400, "too_many_items"),
        ("GET", "/health?probe=1", 200, None),
    ],
)
def test_odd_addresses_are_served_or_refused_in_json(
    echo_gateway: RunningGateway, method: str, path: str, status: int, code: str | None
) -> None:
    answer = httpx.request(method, f"{echo_gateway.url}{path}", trust_env=False, follow_redirects=False)
    assert answer.status_code == status
    assert "location" not in answer.headers
    if method == "HEAD":
        assert answer.content == b""
        assert int(answer.headers["content-length"]) > 0
    else:
        assert answer.json().get("error", {}).get("code") == code


@pytest.mark.parametrize("headers", [{"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}, {}])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/nowhere", 404),
        ("POST", "/v1/models", 405),
        ("PUT", "/v1/completions", 405),
        ("POST", "/v1/completions", 415),
        ("POST", "//v1/completions/", 415),
    ],
)
def test_a_body_is_refused_only_where_one_is_taken(
    echo_gateway: RunningGateway, method: str, path: str, status: int, headers: dict[str, str]
) -> None:
    answer = httpx.request(method, f"{echo_gateway.url}{path}", content=b"{}", headers=headers, trust_env=False)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_plain_http_where_the_websocket_is_says_what_to_use(echo_gateway: RunningGateway) -> None:
    answer = echo_gateway.http.get("/v1/stream")
    assert answer.status_code == 426
    assert (answer.headers["upgrade"], answer.headers["connection"]) == ("websocket", "Upgrade")
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "ws://" in answer.json()["error"]["message"]


def test_a_model_was_created_when_it_was_prepared_whichever_process_says_so(
    model_dir: Path, echo_gateway: RunningGateway
) -> None:
    (listed,) = echo_gateway.http.get("/v1/models").json()["data"]
    assert listed["created"] == int((model_dir / "tidewright.json").stat().st_mtime) > 0
    assert echo_gateway.http.get(f"/v1/models/{MODEL}").json() == listed


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/v1/chat/completions"])
def test_a_head_request_leaves_its_connection_open(echo_gateway: RunningGateway, path: str) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", echo_gateway.port, timeout=30)) as connection:
        connection.connect()
        connection.auto_open = 0
        for method in ("HEAD", "GET"):
            connection.request(method, path if method == "HEAD" else "/health")
            answer = connection.getresponse()
            assert bool(answer.read()) == (method == "GET")
    assert answer.status == 200


def test_a_trailing_slash_is_no_other_endpoint(echo_gateway: RunningGateway) -> None:
    url = f"{echo_gateway.url}//v1/chat/completions/"
    assert httpx.post(url, json={"model": MODEL, **CHAT}, trust_env=False).status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "nonsense"])
def test_an_encoded_body_is_a_415(echo_gateway: RunningGateway, encoding: str) -> None:
    answer = echo_gateway.post("/v1/chat/completions", CHAT, headers={"Content-Encoding": encoding})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
    assert echo_gateway.post("/v1/chat/completions", CHAT, headers={"Content-Encoding": "identity"}).status_code == 200


def test_without_keys_only_its_own_names_are_served(echo_gateway: RunningGateway) -> None:
    for host in ("localhost", f"127.0.0.1:{echo_gateway.port}", "[::1]:1", "LOCALHOST:80"):
        assert echo_gateway.http.get("/version", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.", "x:y:1"):
        assert echo_gateway.http.get("/health/ready", headers={"Host": host}).status_code == 200  # for probes
        for path in ("/version", "/admin/status", "/", "/docs"):
            refused = echo_gateway.http.get(path, headers={"Host": host})
            assert (refused.status_code, refused.json()["error"]["code"]) == (421, "unknown_host"), host
    headers = {"Host": "evil.example", "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    refused = echo_gateway.http.get("/v1/stream", headers={**headers, "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg=="})
    assert (refused.status_code, refused.json()["error"]["code"]) == (421, "unknown_host")


def test_pages_for_people_load_nothing_from_elsewhere(echo_gateway: RunningGateway) -> None:
    for path in ("/", "/docs", "/page/reference.css", "/page/chat.js"):
        answer = echo_gateway.http.get(path)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "//cdn" not in answer.text
    page = echo_gateway.http.get("/docs").text
    assert "/v1/chat/completions" in page
    assert "Sample from the most likely tokens" in page


def test_a_cors_preflight_is_for_those_who_are_named(model_dir: Path, echo: EchoReplica) -> None:
    origin = "https://app.example"
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with RunningGateway(model_dir, echo, cors_origins=f"{origin}, https://b.example") as gateway:
        ok = gateway.http.options("/v1/chat/completions", headers={"Origin": origin, **asks})
        assert (ok.status_code, ok.headers["access-control-allow-origin"]) == (200, origin)
        answer = gateway.post("/v1/chat/completions", CHAT, headers={"Origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin
        refused = gateway.post("/v1/chat/completions", {}, headers={"Origin": origin})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, origin)
        evil = {"Origin": "https://evil.example"}
        assert gateway.http.options("/v1/chat/completions", headers={**evil, **asks}).status_code == 400
        assert "access-control-allow-origin" not in gateway.post("/v1/chat/completions", CHAT, headers=evil).headers


def test_by_default_no_page_of_another_origin_may_call(echo_gateway: RunningGateway) -> None:
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert echo_gateway.http.options("/v1/chat/completions", headers=asks).status_code == 405


def test_a_key_may_come_in_the_headers_of_other_apis(model_dir: Path, tmp_path: Path, echo: EchoReplica) -> None:
    key = add(FileStore(tmp_path / "keys.yaml"), "alice")
    with RunningGateway(model_dir, echo, keys=tmp_path / "keys.yaml") as gateway:
        for headers in ({"x-api-key": key}, {"api-key": key}, {"Authorization": f"Bearer {key}"}):
            assert gateway.post("/v1/chat/completions", CHAT, headers=headers).status_code == 200
        for headers in ({"x-api-key": "tw-x"}, {"api-key": ""}, {}):
            assert gateway.post("/v1/chat/completions", CHAT, headers=headers).status_code == 401
        # With keys, any name is good.
        assert gateway.http.get("/health", headers={"Host": "llm.example"}).status_code == 200


def test_a_replica_of_another_model_makes_it_not_ready_and_nobody_is_blamed(
    model_dir: Path,
) -> None:
    with EchoReplica() as replica:
        replica.status = msgspec.structs.replace(replica.status, model="llama")
        with RunningGateway(model_dir, replica, wait_for_replica=0.1) as gateway:
            ready = gateway.http.get("/health/ready")
            assert (ready.status_code, ready.json()["error"]["code"]) == (503, "not_ready")
            (told,) = gateway.http.get("/admin/status").json()["replicas"]
            assert told["trouble"] == f"serves llama, not {model_dir.name}"
            refused = gateway.post("/v1/chat/completions", CHAT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
            assert replica.grpc_url not in ready.text + refused.text
            assert "llama" not in refused.text


def test_what_replicas_say_of_their_addresses_is_for_admins(model_dir: Path) -> None:
    (port,) = free_ports(1)
    gateway = RunningGateway(model_dir, wait_for_replica=0.1, replicas=f"127.0.0.1:{port}")
    with gateway:
        for answer in (gateway.post("/v1/chat/completions", CHAT), gateway.http.get("/health/ready")):
            assert answer.status_code == 503
            assert str(port) not in answer.text
        assert str(port) in gateway.http.get("/admin/status").text


def test_query_parameters_are_known_or_refused_by_name(echo_gateway: RunningGateway) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        refused = echo_gateway.post(f"{path}?stream=true", CHAT).json()["error"]
        assert (refused["code"], refused["param"]) == ("unknown_parameter", "stream")
    assert echo_gateway.post("/v1/messages?beta=true", CHAT).status_code == 200
    answer = echo_gateway.http.get("/v1/models?beta=true&limit=1", headers={"anthropic-version": "2023-06-01"})
    assert [one["id"] for one in answer.json()["data"]] == [MODEL]
    answer = echo_gateway.http.get(f"/v1/models?after_id={MODEL}", headers={"anthropic-version": "2023-06-01"})
    assert answer.json() == {"data": [], "has_more": False, "first_id": None, "last_id": None}
    refused = echo_gateway.http.get("/v1/responses/resp_1/input_items?limit=0").json()["error"]
    assert refused["param"] == "limit"
    assert refused["message"].startswith("limit: ")


def test_unknown_ones_are_ignored_and_named_where_fields_are(model_dir: Path, echo: EchoReplica) -> None:
    with RunningGateway(model_dir, echo, unknown_fields="ignore") as gateway:
        answer = gateway.post("/v1/chat/completions?api-version=1", CHAT)
        assert (answer.status_code, answer.headers["x-ignored-fields"]) == (200, "api-version")


def test_a_history_is_checked_where_it_is_only_counted(echo_gateway: RunningGateway) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}
    refused = echo_gateway.post("/tokenize", {"messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages.0.tool_calls.0.function.arguments"
