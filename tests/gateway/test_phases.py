"""In which order a request is limited, validated and computed, what it gets, and how it ends before its end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from helpers.api_keys import add
from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from helpers.redis import RunningRedis
from helpers.websocket import StreamClient
from tidewright_gateway.auth.callers import Limits, Role
from tidewright_gateway.auth.stores import FileStore

PROMPT = {"model": MODEL, "prompt": "Hi", "max_tokens": 2}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
PATIENCE = 30.0  # seconds
KEYS: dict[str, dict[str, Any]] = {
    "boss": {"role": Role.ADMIN},
    "plain": {"priority": 7, "weight": 3},
    "once": {"limits": Limits(requests_per_second=0.001)},
    "once_too": {"limits": Limits(requests_per_second=0.001)},
    "once_more": {"limits": Limits(requests_per_second=0.001)},
    "frugal": {"limits": Limits(tokens_per_minute=60)},
    "frugal_too": {"limits": Limits(tokens_per_day=60)},
    "rich": {"limits": Limits(tokens_per_minute=100_000)},
    "users": {"user_limits": Limits(tokens_per_day=50)},
    "shared": {},
}


class Gateway:
    def __init__(self, running: RunningGateway, replica: EchoReplica, store: FileStore, keys: dict[str, str]) -> None:
        self.running, self.replica, self.store, self.keys = running, replica, store, keys
        self.url = running.url

    def post(self, key: str, body: dict[str, Any] | bytes = PROMPT, path: str = "/v1/completions") -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.keys[key]}", "Content-Type": "application/json"}
        return self.running.http.post(path, content=content, headers=headers)

    def stream(self, key: str, body: dict[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {self.keys[key]}"}
        return self.running.http.stream("POST", "/v1/completions", json={**body, "stream": True}, headers=headers)


@pytest.fixture(scope="module")
def gateway(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    store = FileStore(folder / "keys.yaml")
    keys = {name: add(store, name, **values) for name, values in KEYS.items()}
    with EchoReplica() as replica:
        replica.status = msgspec.structs.replace(replica.status, max_running=3)
        options = {"keys": folder / "keys.yaml", "sse_keep_alive": 0.1, "max_queue_share": 1, "trace_callers": False}
        with RunningGateway(model_dir, replica, **options) as running:
            yield Gateway(running, replica, store, keys)


@contextmanager
def held(replica: EchoReplica) -> Iterator[None]:
    """Its generations wait before their first token."""
    replica.go_on.clear()
    try:
        yield
    finally:
        replica.go_on.set()


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("key", "path", "body", "status"),
    [
        ("once", "/v1/completions", b"{not even JSON", 400),
        ("once_too", "/tokenize", b'{"prompt": "Hi"}', 200),
        ("once_more", "/detokenize", b'{"tokens": []}', 400),
    ],
)
def test_a_request_counts_before_anything_is_done_for_it(
    gateway: Gateway, key: str, path: str, body: bytes, status: int
) -> None:
    assert gateway.post(key, body, path).status_code == status
    refused = gateway.post(key, b"[" * 100_000, path)  # what it is no longer matters
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")


@pytest.mark.parametrize(("key", "limit"), [("frugal", "tokens_per_minute"), ("frugal_too", "tokens_per_day")])
def test_an_answer_without_max_tokens_is_as_long_as_the_limits_allow(gateway: Gateway, key: str, limit: str) -> None:
    """Its context has 8192 tokens: to reserve them all would refuse every chat."""
    answer = gateway.post(key, CHAT, "/v1/chat/completions")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["limited_by"], answer.headers["X-Limited-By"]) == (limit, limit)
    assert body["choices"][0]["finish_reason"] == "length"
    assert 1 <= body["usage"]["completion_tokens"] <= 60
    refused = gateway.post(key, CHAT, "/v1/chat/completions")
    assert refused.status_code == 429
    assert "Retry-After" in refused.headers


def test_a_stream_says_in_its_last_chunk_what_limited_it(gateway: Gateway) -> None:
    with gateway.stream("users", {"model": MODEL, "prompt": "Hi", "max_tokens": 20, "user": "a"}) as whole:
        assert "limited_by" not in whole.read().decode()
    headers = {"Authorization": f"Bearer {gateway.keys['users']}"}
    body = {**CHAT, "stream": True, "user": "b", "stream_options": {"include_usage": True}}
    answer = gateway.running.http.post("/v1/chat/completions", json=body, headers=headers).text
    events = [json.loads(line[6:]) for line in answer.split("\n\n") if line.startswith("data: {")]
    said = [event.get("limited_by") for event in events]
    assert said[-2:] == ["tokens_per_day", None]  # the last is the usage
    assert not any(said[:-2])
    assert events[-1]["usage"]["total_tokens"] <= 50


def test_who_has_room_gets_the_whole_answer_and_is_charged_what_it_was(gateway: Gateway) -> None:
    gateway.replica.limit = 700  # more than is reserved at first
    try:
        answer = gateway.post("rich", CHAT, "/v1/chat/completions")
    finally:
        gateway.replica.limit = None
    usage = answer.json()["usage"]
    assert usage["completion_tokens"] == 700
    assert "limited_by" not in answer.json()
    left = int(gateway.post("rich", PROMPT).headers["X-RateLimit-Remaining-Tokens"])
    # A hundred thousand a minute come back at 1667 a second.
    assert 100_000 - usage["total_tokens"] - 10 <= left <= 100_000


def test_the_engine_is_told_the_priority_of_the_key_and_only_admins_go_first(gateway: Gateway) -> None:
    def priority(key: str, **own: int) -> int:
        assert gateway.post(key, {**PROMPT, **own}).status_code == 200
        return gateway.replica.requests[-1][1].priority

    assert priority("plain") == 7
    assert priority("plain", priority=5) == 12
    assert priority("plain", priority=-(2**31)) == 7
    assert priority("plain", priority=2**31 - 1) == 7 + 1000
    assert priority("boss", priority=-5) == -5
    assert priority("boss", priority=-(2**31)) == -1000


def test_the_engine_is_told_whose_request_it_is(gateway: Gateway) -> None:
    """And its weight and priority, on every way in, whatever the request says of them."""

    def told() -> tuple[str, int, int]:
        sampling = gateway.replica.requests[-1][1]
        return sampling.tenant, sampling.tenant_weight, sampling.priority

    forgeries: list[dict[str, Any]] = [{"tenant": "boss"}, {"tenant_weight": 1000}, {"priority": -(2**31)}]
    for path, body in (
        ("/v1/completions", PROMPT),
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {"model": MODEL, "input": "Hi"}),
        ("/v1/messages", {**CHAT, "max_tokens": 2}),
    ):
        assert gateway.post("plain", body, path).status_code == 200
        assert told() == ("plain", 3, 7)
        for forged in forgeries:
            answer = gateway.post("plain", {**body, **forged}, path)
            assert answer.status_code == 400 or told() == ("plain", 3, 7), (path, answer.text)
    assert gateway.post("shared").status_code == 200
    assert told() == ("shared", 1, 0)
    with StreamClient(gateway.url, token=gateway.keys["plain"]) as client:
        client.start("a", **PROMPT, priority=-(2**31))
        client.rest()
    assert told() == ("plain", 3, 7)


def test_nobody_shares_a_kv_cache_with_another_key_or_user(gateway: Gateway) -> None:
    def salt(key: str, **own: str) -> str | None:
        assert gateway.post(key, {**PROMPT, **own}).status_code == 200
        return gateway.replica.requests[-1][1].cache_salt

    requests: list[dict[str, str]] = [{}, {"user": "a"}, {"cache_salt": "a"}, {"user": "a", "cache_salt": "a"}]
    salts = [salt(key, **own) for key in ("plain", "shared") for own in requests]
    assert None not in salts
    assert len(set(salts)) == len(salts)
    assert salt("plain", user="a") == salts[1]


def test_as_many_run_as_the_engine_computes(gateway: Gateway) -> None:
    jobs = []
    with held(gateway.replica):
        for number in range(5):
            body = {**PROMPT, "prompt": f"Job {number}"}
            jobs.append(threading.Thread(target=gateway.post, args=("boss", body)))
            jobs[-1].start()
        headers = {"Authorization": f"Bearer {gateway.keys['boss']}"}

        def status() -> dict[str, Any]:
            found: dict[str, Any] = gateway.running.http.get("/admin/status", headers=headers).json()
            return found

        until(lambda: (status()["running"], status()["waiting"]) == (3, 2))
    for job in jobs:
        job.join()


def test_a_silent_stream_gets_comments_and_a_late_error_is_an_event(gateway: Gateway) -> None:
    with held(gateway.replica):
        with gateway.stream("plain", {**PROMPT, "timeout": 3}) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = answer.iter_lines()
            assert [next(lines) for _ in range(4)] == [": keep-alive", "", ": keep-alive", ""]
            gateway.replica.go_on.set()
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        gateway.replica.go_on.clear()
        with gateway.stream("plain", {**PROMPT, "prompt": "Another", "timeout": 0.5}) as answer:
            said = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert json.loads(said[-1][6:])["error"]["code"] == "timeout"


def test_a_timeout_is_not_to_be_tried_again(gateway: Gateway) -> None:
    with held(gateway.replica):
        answer = gateway.post("plain", {**PROMPT, "prompt": "Late", "timeout": 0.2})
    assert (answer.status_code, answer.headers["X-Should-Retry"]) == (408, "false")
    assert "X-Should-Retry" not in gateway.post("plain", {}).headers  # nobody would


def test_what_runs_ends_when_its_key_is_revoked(gateway: Gateway) -> None:
    gateway.replica.pause = 0.02
    lost, keys = add(gateway.store, "lost"), gateway.keys
    keys["lost"] = lost
    until(lambda: gateway.post("lost").status_code == 200)
    try:
        with (
            gateway.stream("lost", {**PROMPT, "max_tokens": 8000}) as answer,
            StreamClient(gateway.url, token=lost) as client,
        ):
            lines = answer.iter_lines()
            while not next(lines).startswith("data: "):
                pass
            client.start("a", **{**PROMPT, "max_tokens": 8000})
            client.tokens(2)
            gateway.store.change("lost", lambda entry: None)
            told = json.loads([line for line in lines if line.startswith("data: ")][-1][6:])
            _, (done,) = client.rest()
            assert (told["error"]["code"], done["error"]["code"]) == ("invalid_api_key",) * 2
        assert gateway.replica.wait_running(0, PATIENCE)
        # Nothing of others has ended.
        assert gateway.post("plain").status_code == 200
    finally:
        gateway.replica.pause = 0.0


def test_an_admin_sees_that_a_store_is_lost_and_so_do_probes(model_dir: Path, echo: EchoReplica) -> None:
    with RunningRedis() as redis, RunningGateway(model_dir, echo, limits_store=redis.url) as gateway:
        gateway.post("/v1/completions", PROMPT)
        assert gateway.http.get("/health/ready").json() == {"status": "ready"}
        redis.kill()
        until(lambda: gateway.http.get("/health/ready").json().get("lost_stores") == ["limits"])
        assert gateway.metric("store_lost", store="limits") == 1
        assert gateway.metric("store_lost", store="keys") == 0
        assert "gone" in gateway.http.get("/admin/status").json()["stores"]["limits"]
        redis.start()
        until(lambda: gateway.metric("store_lost", store="limits") == 0)
