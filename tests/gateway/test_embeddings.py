"""/v1/embeddings and /v1/score against a replica whose embeddings are known: shapes, order, bounds, limits, tasks."""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from click.testing import CliRunner

from helpers.api_keys import add
from helpers.echo_replica import EchoReplica, embedding_of
from helpers.gateway import MODEL, RunningGateway
from tidewright.launch.cli import main
from tidewright.tokenization import Tokenizer
from tidewright_gateway.auth.callers import Limits
from tidewright_gateway.auth.stores import FileStore

CONTEXT = 64  # tokens


@pytest.fixture(scope="module")
def replica() -> Iterator[EchoReplica]:
    with EchoReplica(max_model_len=CONTEXT) as started:
        started.status = msgspec.structs.replace(started.status, embedding_size=4, max_running=8)
        yield started


@pytest.fixture(scope="module")
def gateway(model_dir: Path, replica: EchoReplica) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, replica, max_queue=16, access_log="-") as running:
        yield running


def embed(gateway: RunningGateway, input: Any, **options: Any) -> httpx.Response:
    return gateway.post("/v1/embeddings", {"input": input, **options})


def test_every_form_of_input_gives_its_embeddings_in_order(gateway: RunningGateway, tokenizer: Tokenizer) -> None:
    texts = ["The sea is calm.", "Hello", "One two three four five"]
    ids = [tokenizer.encode(text) for text in texts]
    for given, meant in ((texts[0], ids[:1]), (texts, ids), (ids[0], ids[:1]), (ids, ids)):
        body = embed(gateway, given).json()
        assert body["object"] == "list"
        assert body["model"] == MODEL
        assert body["data"] == [
            {"object": "embedding", "index": index, "embedding": list(embedding_of(one))}
            for index, one in enumerate(meant)
        ]
        count = sum(map(len, meant))
        assert body["usage"] == {"prompt_tokens": count, "total_tokens": count}


def test_many_texts_come_back_in_order(gateway: RunningGateway, replica: EchoReplica) -> None:
    """More than queue and replica take at once."""
    inputs = [[number + 1, 7] for number in range(2048)]
    before, sent_on = len(replica.requests), gateway.metric("overhead_seconds_count")
    data = embed(gateway, inputs).json()["data"]
    assert gateway.metric("overhead_seconds_count") - sent_on == 1  # the wait of most is no work of the gateway's
    assert [entry["index"] for entry in data] == list(range(2048))
    assert [entry["embedding"][3] for entry in data] == [number + 1.0 for number in range(2048)]
    assert len(replica.requests) - before == 2048
    assert embed(gateway, [*inputs, [1]]).status_code == 400


def test_base64_is_the_same_as_little_endian_float32(gateway: RunningGateway) -> None:
    (entry,) = embed(gateway, [5, 6], encoding_format="base64").json()["data"]
    assert struct.unpack("<4f", base64.b64decode(entry["embedding"])) == embedding_of([5, 6])
    (found,) = gateway.openai.embeddings.create(model=MODEL, input=[5, 6]).data  # base64, if not told otherwise
    assert found.embedding == list(embedding_of([5, 6]))


def test_dimensions_cut_and_scale(gateway: RunningGateway) -> None:
    (found,) = gateway.openai.embeddings.create(model=MODEL, input="Hello", dimensions=2).data
    assert found.embedding == pytest.approx([0.6, 0.8])
    for wrong, message in ((0, "dimensions"), (5, "dimensions is 5, more than the 4 of the model")):
        answer = embed(gateway, "Hello", dimensions=wrong)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "dimensions"


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({}, 400, "invalid_value", "input is missing"),
        ({"input": []}, 400, "invalid_value", "input is an empty list"),
        ({"input": ""}, 400, "invalid_prompt", "the prompt is empty"),
        ({"input": ["a", ""]}, 400, "invalid_prompt", "the prompt is empty; send at least one character (input.1)"),
        ({"input": [[1], []]}, 400, "invalid_value", "input.1 has no tokens"),
        ({"input": [-1]}, 400, "invalid_value", "token ids must be from 0"),
        ({"input": [1, "a"]}, 400, "invalid_value", "input"),
        ({"input": [["a"]]}, 400, "invalid_value", "input"),
        ({"input": {"a": 1}}, 400, "invalid_value", "input"),
        ({"input": None}, 400, "invalid_value", "input"),
        ({"input": "a", "encoding_format": "hex"}, 400, "invalid_value", "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 5}, 400, "unknown_parameter", "truncate_prompt_tokens"),
        ({"input": "a", "model": "other"}, 404, "model_not_found", "there is no model 'other' here"),
        ({"input": "word " * 100}, 400, "context_length_exceeded", "; input has"),
        ({"input": ["a", "word " * 100]}, 400, "context_length_exceeded", "; input.1 has"),
        ({"input": [1] * 65}, 400, "context_length_exceeded", "input has 65 items"),
        ({"input": [[1], [1] * 65]}, 400, "context_length_exceeded", "input.1 has 65 items"),
        ({"input": "x" * 100_000}, 400, "context_length_exceeded", "100000 characters"),
        ({"input": ["a"] * 2049}, 400, "too_many_items", "input has 2049 texts, more than 2048"),
    ],
)
def test_bad_input_is_refused(
    gateway: RunningGateway, body: dict[str, Any], status: int, code: str, message: str
) -> None:
    answer = gateway.post("/v1/embeddings", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert message in error["message"]


def test_an_input_may_fill_the_context(gateway: RunningGateway) -> None:
    assert embed(gateway, [1] * CONTEXT).json()["data"][0]["embedding"][2] == CONTEXT


def test_an_embed_server_generates_nothing(gateway: RunningGateway) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "Hi"})):
        answer = gateway.post(path, body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "unsupported")
        assert error["message"] == (
            "this server computes embeddings (serve --task embed); use /v1/embeddings or /v1/score"
        )


def test_a_server_that_generates_has_no_embeddings(echo_gateway: RunningGateway) -> None:
    with pytest.raises(openai.NotFoundError, match="tidewright serve --task embed") as caught:
        echo_gateway.openai.embeddings.create(model=MODEL, input="Hi")
    assert caught.value.code == "unsupported"
    assert echo_gateway.post("/v1/score", {"text_1": "a", "text_2": "b"}).status_code == 404


def test_one_gateway_serves_both_if_it_has_both(model_dir: Path, replica: EchoReplica, echo: EchoReplica) -> None:
    with RunningGateway(model_dir, replica, echo, routing="round_robin") as both:
        for _ in range(4):
            assert embed(both, [1, 2]).status_code == 200
            assert both.post("/v1/completions", {"prompt": "Hi", "max_tokens": 1}).status_code == 200


def test_another_replica_takes_over(model_dir: Path, replica: EchoReplica) -> None:
    with EchoReplica(max_model_len=CONTEXT) as broken:
        broken.status = replica.status
        broken.errors["decoder"] = "the engine died [engine_failed]"
        with RunningGateway(model_dir, broken, replica, routing="round_robin", retry_base_delay=0.01) as both:
            answer = embed(both, [[number + 1] for number in range(20)])
            assert both.metric("attempt_failures_total") > 0
    assert [entry["embedding"][3] for entry in answer.json()["data"]] == [number + 1.0 for number in range(20)]


def test_scores_are_cosines(gateway: RunningGateway, tokenizer: Tokenizer) -> None:
    def cosine(one: str, other: str) -> float:
        a, b = embedding_of(tokenizer.encode(one)), embedding_of(tokenizer.encode(other))
        dot, a2, b2 = (sum(x * y for x, y in zip(p, q, strict=True)) for p, q in ((a, b), (a, a), (b, b)))
        return float(dot / (a2 * b2) ** 0.5)

    texts = ["The sea", "Hello there you", "a"]
    cases: list[tuple[Any, Any, list[tuple[str, str]]]] = [
        ("Hi", "Hello", [("Hi", "Hello")]),
        ("Hi", texts, [("Hi", text) for text in texts]),
        (["x", "y", "z"], texts, list(zip(["x", "y", "z"], texts, strict=True))),
    ]
    for text_1, text_2, pairs in cases:
        body = gateway.post("/v1/score", {"text_1": text_1, "text_2": text_2}).json()
        assert body["object"] == "list"
        assert [(entry["index"], entry["object"]) for entry in body["data"]] == [
            (i, "score") for i in range(len(pairs))
        ]
        assert [entry["score"] for entry in body["data"]] == pytest.approx([cosine(*pair) for pair in pairs])
        each = {*([text_1] if isinstance(text_1, str) else text_1), *([text_2] if isinstance(text_2, str) else text_2)}
        assert body["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in each)
    for text_1, text_2, message in ((["a", "b"], ["c"], "text_1 has 2 texts"), ("a", [], "text_2 is an empty list")):
        answer = gateway.post("/v1/score", {"text_1": text_1, "text_2": text_2})
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


def test_limits_count_the_prompts_tokens(model_dir: Path, replica: EchoReplica, tmp_path: Path) -> None:
    store = FileStore(tmp_path / "keys.yaml")
    key = add(store, "frugal", limits=Limits(tokens_per_day=10))
    with RunningGateway(model_dir, replica, keys=tmp_path / "keys.yaml") as running:

        def ask(count: int) -> httpx.Response:
            body = {"model": MODEL, "input": [[1] * count]}
            return running.http.post("/v1/embeddings", json=body, headers={"Authorization": f"Bearer {key}"})

        asked = len(replica.requests)
        assert ask(11).status_code == 429
        assert len(replica.requests) == asked
        answer = ask(7)
        assert answer.status_code == 200
        assert answer.headers["X-Served-By"] == "decoder"
        assert answer.headers["x-ratelimit-remaining-tokens"] == "3"
        assert ask(4).status_code == 429
        assert ask(3).status_code == 200
        assert replica.requests[-1][1].cache_salt  # keys share no prefixes
        assert replica.requests[-1][1].tenant
        assert running.http.post("/v1/embeddings", json={"model": MODEL, "input": "a"}).status_code == 401


def test_a_client_that_leaves_ends_them(gateway: RunningGateway, replica: EchoReplica) -> None:
    replica.go_on.clear()
    before = len(replica.requests)
    try:
        with pytest.raises(httpx.ReadTimeout):
            embed_with_timeout(gateway, [[1]] * 500)
        deadline = time.monotonic() + 10
        while gateway.http.get("/admin/status").json()["running"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        replica.go_on.set()
    assert len(replica.requests) - before <= 16


def embed_with_timeout(gateway: RunningGateway, input: Any) -> None:
    with httpx.Client(base_url=gateway.url, timeout=0.5, trust_env=False) as client:
        client.post("/v1/embeddings", json={"model": MODEL, "input": input})


def test_an_error_of_the_model_ends_the_request_once(gateway: RunningGateway, replica: EchoReplica) -> None:
    replica.errors["decoder"] = "prompt has too many tokens [invalid]"
    try:
        answer = embed(gateway, [[1]] * 100)
    finally:
        del replica.errors["decoder"]
    assert answer.status_code == 400
    assert "too many tokens" in answer.json()["error"]["message"]


def test_probes_ask_for_an_embedding(model_dir: Path) -> None:
    with EchoReplica() as probed:
        probed.status = msgspec.structs.replace(probed.status, embedding_size=4)
        with RunningGateway(model_dir, probed, generation_probe_interval=0.2) as running:
            deadline = time.monotonic() + 20
            while running.metric("generation_probes_total", outcome="success") < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert probed.sent == 0  # no token
        assert probed.requests[0][1].priority < 0


def test_others_are_served_beside_a_long_list(gateway: RunningGateway, replica: EchoReplica) -> None:
    replica.pause = 0.01
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(embed(gateway, [[1]] * 1000)))
    try:
        thread.start()
        time.sleep(0.2)
        assert embed(gateway, "Hello").status_code == 200
        assert not answers  # the list takes a second or more
        thread.join(60)
    finally:
        replica.pause = 0.0
    assert answers[0].status_code == 200
    assert json.loads(answers[0].content)["usage"]["prompt_tokens"] == 1000


def test_the_commands_that_generate_say_that_this_server_does_not(gateway: RunningGateway) -> None:
    for command in ("chat", "complete"):
        result = CliRunner().invoke(main, [command, "hi", "--url", gateway.url])
        assert result.stderr.startswith(f"Error: {gateway.url} runs with --task embed and generates no text; ask its")
