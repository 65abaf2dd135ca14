"""What one tenant sends takes nothing of another's: texts, share, cache, limits, breaker. Real keys, real Triton.

While tenant A misbehaves, tenant B asks the same again and again: each answer must be the one that it got alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import transformers as hf

from helpers.api_keys import add
from helpers.byte_fallback import save_byte_fallback, token
from helpers.gateway import MODEL, RunningGateway
from helpers.triton import RunningServer
from tidewright.schema import KILLS_ENGINES
from tidewright_gateway.auth.callers import Limits, Role
from tidewright_gateway.auth.stores import FileStore

CONTEXT, BLOCK, RUNNING = 1024, 16, 4
BLOCK_BYTES = 3 * 2 * 2 * 8 * BLOCK * 4  # layers, keys and values, heads, head size, tokens, float32
BLOCKS = 2 * CONTEXT // BLOCK + 48  # two of the longest prompts, and what B has
OF_A, TOKENS_OF_B = 16, 1_000_000  # limits: concurrent requests, tokens a day
PROMPTS = ["the quick brown fox jumps over the lazy dog and runs on into the deep dark wood " + end for end in "xyz"]
GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 8}
# Ends each engine that is to compute a prompt with this end.
POISON = "\u4e2d" * 3
KILLER = f"""
import os, sys
if "tidewright.engine" in sys.orig_argv:
    from tidewright.engine.scheduler import Scheduler
    schedule = Scheduler.schedule
    def killing(self, *pace):
        plan = schedule(self, *pace)
        if any(self._by_id[one.request_id].prompt_token_ids[-3:] == {[token(POISON[0])] * 3} for one in plan.sequences):
            os._exit(13)
        return plan
    Scheduler.schedule = killing
"""


class World:
    def __init__(self, server: RunningServer, gateway: RunningGateway, key_of_a: str, key_of_b: str) -> None:
        self.server, self.gateway = server, gateway
        self._keys = {"A": key_of_a, "B": key_of_b}
        self.used, self._lock = 0, threading.Lock()  # tokens, by B
        self._alone: dict[str, str] = {}
        for prompt in PROMPTS:
            self._alone[prompt] = self.text(self.ask("B", prompt))
        self.usual()

    def ask(self, who: str, prompt: Any, path: str = "completions", **body: Any) -> httpx.Response:
        return self.send(who, {"model": MODEL, "prompt": prompt, **GREEDY, **body}, path)

    def send(self, who: str, body: Any, path: str = "completions") -> httpx.Response:
        content = body if isinstance(body, (str, bytes)) else json.dumps(body)
        headers = {"Authorization": f"Bearer {self._keys[who]}", "Content-Type": "application/json"}
        answer = self.gateway.http.post(f"/v1/{path}", content=content, headers=headers)
        if who == "B":
            with self._lock:
                self.used += answer.json()["usage"]["total_tokens"]
        return answer

    @staticmethod
    def text(answer: httpx.Response) -> str:
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def usual(self, is_cached: bool = True) -> None:
        """B's requests, one after the other: their texts, what the cache has of them, and what its limits leave."""
        for prompt, text in self._alone.items():
            before = self.used
            answer = self.ask("B", prompt)
            assert self.text(answer) == text
            usage = answer.json()["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert cached == (usage["prompt_tokens"] - 1) // BLOCK * BLOCK or not is_cached
            assert int(answer.headers["X-RateLimit-Remaining-Tokens"]) == TOKENS_OF_B - before - usage["total_tokens"]

    def beside(self, *requests: Callable[[], httpx.Response], is_cached: bool = True) -> list[httpx.Response]:
        """A's answers to these, sent all at once. Until the last of them, B asks as usual, and once more."""
        with ThreadPoolExecutor(len(requests)) as pool:
            sent = [pool.submit(request) for request in requests]
            while not all(one.done() for one in sent):
                self.usual(is_cached)
        self.usual(is_cached)
        return [one.result() for one in sent]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root: Path = tmp_path_factory.mktemp("isolation")
    folder = root / "model"
    save_byte_fallback(folder, hf.LlamaConfig, "llama", max_position_embeddings=CONTEXT)
    (root / "hook").mkdir()
    (root / "hook" / "sitecustomize.py").write_text(KILLER)
    store = FileStore(root / "keys.yaml")
    keys = [
        add(store, "a", limits=Limits(concurrent=OF_A)),
        add(store, "b", limits=Limits(tokens_per_day=TOKENS_OF_B)),
    ]
    admin = add(store, "admin", role=Role.ADMIN)
    options: dict[str, Any] = {"max_running": RUNNING, "kv_cache_memory": str(BLOCKS * BLOCK_BYTES)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(root / "hook"))
        server = RunningServer(folder, dtype="float32", **options)
        with server, RunningGateway(folder, server, keys=root / "keys.yaml", wait_for_replica=60) as gateway:
            gateway.http.headers["Authorization"] = f"Bearer {admin}"
            assert server.metric("kv_blocks") == BLOCKS
            yield World(server, gateway, *keys)


@pytest.fixture(autouse=True)
def _no_breaker_opens(world: World) -> Iterator[None]:
    yield
    assert world.gateway.metric("breaker_transitions_total") == 0


def distinct(number: int, length: int, filler: str = "k") -> list[int]:
    """A prompt that begins as no other."""
    return [token("abcdefghij"[number // 10]), token("abcdefghij"[number % 10]), *[token(filler)] * (length - 2)]


def test_a_flood(world: World) -> None:
    """It takes its share and no more, and what is beyond its limits is refused."""
    done: list[httpx.Response] = []
    stop = threading.Event()

    def flood(number: int) -> None:
        while not stop.is_set():
            done.append(world.ask("A", distinct(number, 20), max_tokens=40))

    def served() -> int:
        return sum(answer.status_code == 200 for answer in list(done))

    with ThreadPoolExecutor(OF_A) as pool:
        floods = [pool.submit(flood, number) for number in range(OF_A)]
        try:
            while (refused := world.ask("A", "the")).status_code != 429:
                assert not any(one.done() for one in floods)
            during: list[int] = []  # each of B's requests, so many of A's were served
            for prompt in PROMPTS * 2:
                before = served()
                assert world.ask("B", prompt, max_tokens=40).status_code == 200
                during.append(served() - before)
            world.usual()
        finally:
            stop.set()
    # Those that ran beside it. If it waited behind the flood's queue, all of that would be served first, each time.
    assert min(during) <= 2 * RUNNING, during
    assert {answer.status_code for answer in done} <= {200, 429}
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert f"{OF_A} requests at one time" in refused.json()["error"]["message"]


def test_prompts_as_long_as_allowed(world: World) -> None:
    longest = CONTEXT - GREEDY["max_tokens"]
    answers = world.beside(
        *(lambda number=number: world.ask("A", distinct(number, longest, "l")) for number in range(5)),  # type: ignore[misc]
        lambda: world.ask("A", distinct(9, CONTEXT + 1)),
        lambda: world.ask("A", "a" * 400_000),
    )
    assert [answer.status_code for answer in answers] == [200] * 5 + [400, 400]
    for answer in answers[5:]:
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert str(CONTEXT) in answer.json()["error"]["message"]


def test_bad_requests_of_all_kinds(world: World) -> None:
    ok = {"model": MODEL, "prompt": "the", **GREEDY}
    nested: Any = {"type": "string"}
    for _ in range(64):
        nested = {"type": "object", "properties": {"a": nested}, "required": ["a"]}
    bad: list[tuple[str, Any]] = [
        ("completions", "{"),
        ("completions", b"\xff\xfe"),
        ("completions", "[" * 100_000),
        ("completions", []),
        ("completions", ok | {"prompt": None}),
        ("completions", ok | {"prompt": [-1]}),
        ("completions", ok | {"prompt": [10**9]}),
        ("completions", ok | {"model": "other"}),
        ("completions", ok | {"max_tokens": "many"}),
        ("completions", ok | {"max_tokens": 2**40}),
        ("completions", ok | {"top_k": 2**63}),
        ("completions", ok | {"n": 1000}),
        ("completions", ok | {"temperature": 1e400}),
        ("completions", ok | {"logit_bias": {"18446744073709551616": 1}}),
        ("completions", ok | {"tenant": "b"}),
        ("completions", ok | {"tenant_weight": 1000}),
        ("completions", ok | {"stop": ["x" * 10_000] * 100}),
        ("chat/completions", {"model": MODEL, "messages": []}),
        ("chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": {"a": 1}}]}),
        (
            "chat/completions",
            {
                "model": MODEL,
                "messages": [{"role": "user", "content": "a"}],
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": nested}},
            },
        ),
        ("load_lora_adapter", {"lora_name": "a", "lora_path": "/"}),
    ]
    answers = world.beside(*(lambda path=path, body=body: world.send("A", body, path) for path, body in bad * 2))  # type: ignore[misc]
    for (path, body), answer in zip(bad * 2, answers, strict=True):
        assert 400 <= answer.status_code < 500, (path, str(body)[:100], answer.text)
        assert answer.json()["error"]["message"], (path, str(body)[:100])


def test_a_request_that_kills_the_engine(world: World) -> None:
    """It costs engines until it is found by trials; the prefix cache of an engine dies with it."""
    deaths = world.server.metric("engine_restarts_total")
    (answer,) = world.beside(lambda: world.ask("A", "the " + POISON), is_cached=False)
    assert answer.status_code >= 500
    assert KILLS_ENGINES in answer.json()["error"]["message"]
    assert 2 <= world.server.metric("engine_restarts_total") - deaths <= 4
    assert world.ask("A", "the").status_code == 200
    world.usual()


def test_cache_churn(world: World) -> None:
    """Twice what the cache has, so that all would be new without shares."""
    length, evictions = 15 * BLOCK, world.server.metric("prefix_cache_evictions_total")
    for first in range(0, 2 * BLOCKS * BLOCK // length, 10):
        prompts = [distinct(number, length, "m") for number in range(first, first + 10)]
        answers = world.beside(*(lambda prompt=prompt: world.ask("A", prompt) for prompt in prompts))  # type: ignore[misc]
        assert {answer.status_code for answer in answers} == {200}
    world.server.wait_idle()
    assert world.server.metric("prefix_cache_evictions_total") - evictions > BLOCKS


def test_the_same_user_under_two_keys_shares_no_prefix(world: World) -> None:
    prompt, user = distinct(99, 5 * BLOCK), f"alice, {world.used}"

    def cached(who: str, **body: Any) -> int:
        answer = world.ask(who, prompt, user=user, **body)
        assert answer.status_code == 200
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(who) for who in "BABA"] == [0, 0, 4 * BLOCK, 4 * BLOCK]
    assert [cached(who, cache_salt="same") for who in "BABA"] == [0, 0, 4 * BLOCK, 4 * BLOCK]
