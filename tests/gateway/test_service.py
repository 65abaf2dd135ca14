"""Keys, limits, cache, queue, degradation and fallback as a client sees them: a gateway before an echoing replica."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest

from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from tidewright_gateway.auth.callers import Limits, Role
from tidewright_gateway.auth.keys import KeyEntry, make_key
from tidewright_gateway.auth.stores import open_store

LIMITS = {
    "boss": Limits(),
    "plain": Limits(),
    "other": Limits(),
    "one": Limits(concurrent=1),
    "few": Limits(tokens_per_minute=100),
    "slow": Limits(requests_per_second=0.01),
}
DOCS = Path(__file__).parent.parent.parent / "docs"
TOO_BUSY = 1.0  # of what may wait


class Clients:
    """A client for each key."""

    def __init__(self, gateway: RunningGateway, replica: EchoReplica, keys: dict[str, str], log: Path) -> None:
        self.gateway, self.replica, self.keys, self._log = gateway, replica, keys, log

    def post(self, key: str, max_tokens: int = 4, prompt: str = "Hi", headers: dict | None = None, **body: object):
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **body}
        headers = {"Authorization": f"Bearer {self.keys[key]}", **(headers or {})}
        return self.gateway.post("/v1/completions", body, headers=headers)

    def in_background(self, pool: ThreadPoolExecutor, *args: object, **body: object):
        return pool.submit(self.post, *args, **body)

    def status(self) -> dict:
        headers = {"Authorization": f"Bearer {self.keys['boss']}"}
        return self.gateway.http.get("/admin/status", headers=headers).json()

    def wait(self, reached: Callable[[dict], bool]) -> None:
        deadline = time.monotonic() + 30
        while not reached(status := self.status()):
            assert time.monotonic() < deadline, status
            time.sleep(0.02)

    def load(self, waiting: float) -> None:
        """As the replica tells it, and the ladder sees it."""
        self.replica.status = msgspec.structs.replace(self.replica.status, waiting=waiting)
        self.wait(lambda status: status["replicas"][0]["load"] == waiting)

    def level(self, name: str) -> None:
        """Until the ladder is there, by itself."""
        self.wait(lambda status: status["level"] == name)

    def logged(self, answer: httpx.Response) -> dict:
        """The line of the request, which is written behind its answer."""
        deadline = time.monotonic() + 30
        while True:
            for line in map(json.loads, self._log.read_text().splitlines()):
                if line["request_id"] == answer.headers["X-Request-Id"]:
                    return line
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture(scope="module")
def clients(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    folder = tmp_path_factory.mktemp("gateway")
    store, keys = open_store(str(folder / "keys.yaml")), {}
    for name, limits in LIMITS.items():
        keys[name], hashed = make_key(name)
        role = Role.ADMIN if name == "boss" else Role.USE
        entry = KeyEntry(name, (hashed,), role, limits, user_limits=Limits(concurrent=1))
        store.change(name, lambda _, entry=entry: entry)
    options = {
        "keys": folder / "keys.yaml",
        "access_log": folder / "access.log",
        "cache_size": 1 << 20,
        "fallback": True,
        "max_running": 2,
        "max_queue": 2,
        "queue_timeout": 30,
        "max_queue_share": 1,
        "degradation": True,
        "trace_callers": True,
        "degrade_queue_short": 0.8,
        "degrade_queue_fallback": 0.9,
        "degrade_queue_shed": 1.0,
        "degrade_dwell": 0.05,
        "degrade_max_tokens": 3,
        "retry_max_attempts": 1,
        "trace_sample_ratio": 1,
    }
    with EchoReplica() as replica, RunningGateway(model_dir, replica, **options) as gateway:
        yield Clients(gateway, replica, keys, folder / "access.log")


def test_a_key_is_needed_and_its_role_counts(clients: Clients) -> None:
    http = clients.gateway.http
    for path in ("/v1/models", "/metrics", "/admin/status", "/v1/completions", "/v2/models", "/no/such/path"):
        assert http.get(path).status_code == 401, path
    assert http.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
    for path in ("/", "/page/chat.js", "/docs", "/openapi.json", "/health/live", "/health/ready"):
        assert http.get(path).status_code == 200, path
    assert http.get("/v1/stream").status_code == 426  # also where a proxy has dropped the headers of the WebSocket
    for key, metrics in (("plain", 403), ("boss", 200)):
        headers = {"Authorization": f"Bearer {clients.keys[key]}"}
        assert http.get("/v1/models", headers=headers).status_code == 200
        assert http.get("/metrics", headers=headers).status_code == metrics
        assert http.get("/admin/status", headers=headers).status_code == metrics
        # Nothing of Triton's own can be reached through the gateway.
        for path in ("/v2/repository/index", "/v2/models/decoder/config", "/v2/health/ready", "/v2"):
            assert http.get(path, headers=headers).status_code == 404
    wrong = clients.gateway.post("/v1/completions", {"prompt": "Hi"}, headers={"Authorization": "Bearer tw-plain-x"})
    assert (wrong.status_code, wrong.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_the_api_page_is_what_the_gateway_says_and_its_examples_work(clients: Clients) -> None:
    spec = importlib.util.spec_from_file_location("make_gateway_api", DOCS / "make_gateway_api.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    document = clients.gateway.http.get("/openapi.json").json()
    assert (DOCS / "gateway-api.md").read_text() == module.page(document), "run python docs/make_gateway_api.py"
    headers = {"Authorization": f"Bearer {clients.keys['boss']}"}
    for path, example in module.EXAMPLES.items():
        assert f"127.0.0.1:8080{path}" in example
        if "-d '" in example:
            body = json.loads(example.partition("-d '")[2].rstrip("'"))
            answer = clients.gateway.post(path, body, headers=headers)
        else:
            answer = clients.gateway.http.get(path, headers=headers)
        assert answer.status_code == 200, answer.text


def test_what_is_the_same_for_the_same_key_is_generated_once(clients: Clients) -> None:
    before = len(clients.replica.requests)
    first = clients.post("plain", prompt="Cached")
    assert (first.headers["X-Cache"], first.headers["X-Served-By"]) == ("MISS", "decoder")
    again = clients.post("plain", prompt="Cached")
    assert again.headers["X-Cache"] == "HIT"
    assert again.json()["choices"] == first.json()["choices"]
    assert again.json()["usage"] == first.json()["usage"]
    streamed = clients.post("plain", prompt="Cached", stream=True)
    assert streamed.headers["X-Cache"] == "HIT"
    events = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == first.json()["choices"][0]["text"]
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert clients.logged(streamed)["cache"] == ["HIT"]
    assert len(clients.replica.requests) == before + 1
    assert clients.post("other", prompt="Cached").headers["X-Cache"] == "MISS"
    fresh = clients.post("plain", prompt="Cached", headers={"Cache-Control": "no-store"})
    assert fresh.headers["X-Cache"] == "BYPASS"
    assert clients.post("plain", prompt="Cached", temperature=1).headers["X-Cache"] == "BYPASS"
    assert len(clients.replica.requests) == before + 4


def test_a_request_is_logged_with_what_it_used_and_is_part_of_its_trace(clients: Clients) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    answer = clients.post(
        "plain", prompt="Log", headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "X-Request-Id": "me"}
    )
    line = clients.logged(answer)
    assert 0 <= line.pop("queue_seconds") <= line.pop("first_token_seconds") <= line.pop("seconds")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line.pop("pid") == clients.gateway.process.pid
    usage = answer.json()["usage"]
    assert line == {
        "level": "info",
        "process": "gateway",
        "event": "request",
        "message": "POST /v1/completions 200",
        "client": "127.0.0.1",
        "request_id": "me",
        "trace_id": trace,
        "method": "POST",
        "path": "/v1/completions",
        "endpoint": "/v1/completions",
        "status": 200,
        "key_id": "plain",
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": 4,
        "cache": ["MISS"],
        "served_by": "decoder",
        "replicas": [clients.replica.grpc_url],
        "attempts": 1,
        "model": MODEL,
    }
    assert clients.replica.metadata[-1]["traceparent"].startswith(f"00-{trace}-")


def test_limits_are_told_reserved_and_settled(clients: Clients) -> None:
    first = clients.post("few", max_tokens=20)
    used = first.json()["usage"]["total_tokens"]
    assert first.headers["X-RateLimit-Limit-Tokens"] == "100"
    # What is reserved is given back where less was used: from the cache this has no tokens left to generate.
    left = int(clients.post("few", max_tokens=60).headers["X-RateLimit-Remaining-Tokens"])
    assert 0 <= left <= 100 - used - 60 + 5
    refused = clients.post("few", max_tokens=60)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(refused.headers["Retry-After"]) > 10
    line = clients.logged(refused)
    assert (line["event"], line["error"], line["limited_by"]) == (
        "request_refused",
        "rate_limit_exceeded",
        "tokens_per_minute",
    )
    never = clients.post("few", max_tokens=101)
    assert (never.status_code, never.headers["X-Should-Retry"]) == (429, "false")
    assert "lower max_tokens" in never.json()["error"]["message"]
    assert clients.post("slow").status_code == 200
    refused = clients.post("slow")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["Retry-After"]) > 1
    assert refused.headers["X-RateLimit-Remaining-Requests"] == "0"


@pytest.mark.parametrize("how", ["whole", "stream", "left"])
def test_one_at_a_time_means_until_it_has_ended(clients: Clients, how: str) -> None:
    clients.replica.go_on.clear()
    try:
        with ThreadPoolExecutor() as pool:
            body = {"prompt": f"One {how}", "stream": how != "whole"}
            if how == "left":
                headers = {"Authorization": f"Bearer {clients.keys['one']}"}
                with pytest.raises(httpx.ReadTimeout):
                    clients.gateway.post("/v1/completions", body, headers=headers, timeout=1)
            else:
                job = clients.in_background(pool, "one", **body)
                clients.wait(lambda status: status["running"] == 1)
                refused = clients.post("one", prompt="Two")
                assert refused.status_code == 429
                assert "wait until one of them ends" in refused.json()["error"]["message"]
                clients.replica.go_on.set()
                assert job.result().status_code == 200
    finally:
        clients.replica.go_on.set()
    clients.wait(lambda status: status["running"] == 0)
    assert clients.post("one", prompt="Three").status_code == 200


def test_with_the_end_of_an_answer_the_next_request_may_come(clients: Clients) -> None:
    for number in range(40):
        for stream in (False, True):
            answer = clients.post("one", prompt=f"After {number} {stream}", stream=stream)
            assert answer.status_code == 200, answer.text


def test_each_user_of_a_key_has_limits_of_its_own(clients: Clients) -> None:
    clients.replica.go_on.clear()
    try:
        with ThreadPoolExecutor() as pool:
            job = clients.in_background(pool, "plain", prompt="A", user="ann")
            clients.wait(lambda status: status["running"] == 1)
            assert clients.post("plain", prompt="B", user="ann").status_code == 429
            other = clients.in_background(pool, "plain", prompt="C", user="bob")
            clients.wait(lambda status: status["running"] == 2)
            clients.replica.go_on.set()
            assert (job.result().status_code, other.result().status_code) == (200, 200)
    finally:
        clients.replica.go_on.set()


def test_who_finds_no_place_waits_and_too_many_are_refused(clients: Clients) -> None:
    clients.replica.go_on.clear()
    try:
        with ThreadPoolExecutor() as pool:
            jobs = []
            for number, (running, waiting) in enumerate([(1, 0), (2, 0), (2, 1)]):
                jobs.append(clients.in_background(pool, "plain", prompt=f"Wait {number}"))
                clients.wait(lambda s, want=(running, waiting): (s["running"], s["waiting"]) == want)
            jobs.append(clients.in_background(pool, "boss", prompt="Wait 3"))
            clients.wait(lambda status: status["waiting"] == 2)
            refused = clients.post("plain", prompt="Wait 4")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert "Retry-After" in refused.headers
            clients.replica.go_on.set()
            assert [job.result().status_code for job in jobs] == [200] * 4
    finally:
        clients.replica.go_on.set()
    clients.wait(lambda status: status["running"] == 0)
    clients.level("all_features")


def test_the_ladder_shortens_then_falls_back_then_refuses(clients: Clients) -> None:
    try:
        clients.load(0.85)
        clients.level("short_answers")
        short = clients.post("plain", prompt="Short", max_tokens=9)
        assert short.headers["X-Degraded"] == "short-answer"
        assert (short.json()["usage"]["completion_tokens"], short.json()["served_by"]) == (3, "decoder")
        assert short.json()["choices"][0]["finish_reason"] == "length"
        guided = clients.post("plain", prompt="Short", max_tokens=9, guided_regex="a+")
        assert "X-Degraded" not in guided.headers
        assert guided.json()["usage"]["completion_tokens"] == 9
        clients.load(0.95)
        clients.level("fallback_only")
        for stream in (False, True):
            fallback = clients.post("plain", prompt="Short", max_tokens=9, stream=stream)
            assert fallback.headers["X-Served-By"] == "fallback"
            assert fallback.headers["X-Cache"] == "BYPASS"
            assert '"served_by":"fallback"' in fallback.text
        clients.load(TOO_BUSY)
        clients.level("shed")
        refused = clients.post("plain", prompt="Short")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert "queue" in refused.json()["error"]["message"]
    finally:
        clients.load(0.0)
    clients.level("all_features")
    answer = clients.post("plain", prompt="Short", max_tokens=9)
    assert answer.json()["usage"]["completion_tokens"] == 9  # and not the short one, from the cache


def test_the_fallback_answers_for_a_decoder_that_fails(clients: Clients) -> None:
    try:
        clients.replica.errors = {"decoder": "the engine failed"}
        answer = clients.post("plain", prompt="Fails")
        assert (answer.status_code, answer.json()["served_by"]) == (200, "fallback")
        clients.replica.errors["fallback"] = "the other as well"
        refused = clients.post("plain", prompt="Fails")
        assert refused.status_code == 503
        assert "the engine failed" in refused.json()["error"]["message"]
    finally:
        clients.replica.errors = {}
    answer = clients.post("plain", prompt="Fails")
    assert (answer.json()["served_by"], answer.headers["X-Cache"]) == ("decoder", "MISS")


def test_identical_requests_at_the_same_time_share_one_generation(clients: Clients) -> None:
    before = len(clients.replica.requests)
    clients.replica.go_on.clear()
    try:
        with ThreadPoolExecutor() as pool:
            first = clients.in_background(pool, "plain", prompt="Same")
            clients.wait(lambda status: status["running"] == 1)
            others = [clients.in_background(pool, "plain", prompt="Same", stream=True) for _ in range(5)]
            timer = threading.Timer(0.5, clients.replica.go_on.set)
            timer.start()
            assert first.result().headers["X-Cache"] == "MISS"
            # One that comes late finds it in the cache.
            assert {job.result().headers["X-Cache"] for job in others} <= {"SHARED", "HIT"}
    finally:
        clients.replica.go_on.set()
    assert len(clients.replica.requests) == before + 1
