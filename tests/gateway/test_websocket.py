"""/v1/stream of a real gateway in front of a real Triton: the same tokens as over HTTP, whatever the client does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.gateway import MODEL, RunningGateway
from helpers.triton import RunningServer
from helpers.websocket import StreamClient, text_of

REQUEST = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 24}
LONG = {**REQUEST, "max_tokens": 4000, "ignore_eos": True}


@pytest.fixture(scope="module")
def gateway(model_dir: Path, server: RunningServer) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, server, ws_resume_grace=5) as running:
        yield running


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[StreamClient]:
    with StreamClient(gateway.url) as running:
        yield running


@pytest.fixture(scope="module")
def whole(gateway: RunningGateway) -> str:
    """The answer over HTTP."""
    return gateway.post("/v1/completions", REQUEST).json()["choices"][0]["text"]


def test_a_chat_beside_several_choices_gives_what_http_gives(gateway: RunningGateway, client: StreamClient) -> None:
    chat = {"messages": [{"role": "user", "content": "Name three fruits."}], "temperature": 0, "max_tokens": 16}
    several = {"prompt": ["Once", "The sea"], "n": 2, "seed": 7, "max_tokens": 10, "logprobs": 1}
    over_http = gateway.post("/v1/chat/completions", chat).json()
    several_over_http = gateway.post("/v1/completions", several).json()
    client.send("generate", id="chat", request={"model": MODEL, **chat})
    client.send("generate", id="several", request={"model": MODEL, **several})
    messages, done = client.rest(2)
    tokens = [message for message in messages if message["type"] == "token"]

    def texts(id: str, count: int) -> list[str]:
        own = [message for message in tokens if message["id"] == id]
        return [text_of([message for message in own if message["index"] == index]) for index in range(count)]

    assert texts("chat", 1) == [over_http["choices"][0]["message"]["content"]]
    assert texts("several", 4) == [choice["text"] for choice in several_over_http["choices"]]
    ends = {message["id"]: message for message in done}
    for end, answer in (("chat", over_http), ("several", several_over_http)):
        del answer["usage"]["prompt_tokens_details"]
        assert ends[end]["usage"] == answer["usage"]
    assert ends["chat"]["choices"][0]["finish_reason"] == over_http["choices"][0]["finish_reason"]
    assert ends["chat"]["served_by"] == "decoder"
    assert all(
        [next(iter(position)) for position in message["logprobs"]] == list(map(str, message["token_ids"]))
        for message in tokens
        if message["id"] == "several"
    )


def test_a_slow_reader_loses_nothing(client: StreamClient, server: RunningServer, whole: str) -> None:
    client.start("a", credits=2, **REQUEST)
    got = client.tokens(2)
    server.wait_idle()  # the model does not wait
    client.send("credit", id="a", tokens=5)
    got += client.tokens(5)
    client.send("credit", id="a", tokens=1000)
    rest, (done,) = client.rest()
    assert len(rest) == 1
    assert text_of(got + rest) == whole
    assert done["usage"]["completion_tokens"] == 24


def test_after_the_connection_broke_the_rest_comes_over_another(
    gateway: RunningGateway, client: StreamClient, whole: str
) -> None:
    client.start("a", **REQUEST)
    got = client.tokens(9)
    client.drop()
    for id in ("b", "c"):  # the second comes when it is done
        with StreamClient(gateway.url) as other:
            resume = {"resume_token": client.resume_tokens["a"], "received": [got[-1]["seq"]]}
            other.send("resume", id=id, **resume)
            other.receive("started")
            rest, (done,) = other.rest()
        assert text_of(got + rest) == whole
        assert done["choices"] == [{"index": 0, "seq": 24, "finish_reason": "length"}]


@pytest.mark.parametrize("how", ["cancel", "leave for longer than the grace"])
def test_the_engine_stops(gateway: RunningGateway, client: StreamClient, server: RunningServer, how: str) -> None:
    server.wait_idle()
    before = server.metric("generated_tokens_total")
    client.start("a", **LONG)
    client.tokens(3)
    if how == "cancel":
        client.send("cancel", id="a")
        _, (done,) = client.rest()
        assert done["choices"][0]["finish_reason"] == "cancelled"
        assert done["usage"]["completion_tokens"] < 500
    else:
        client.drop()
    server.wait_idle()
    assert server.metric("generated_tokens_total") - before < 2000
    assert gateway.metric("requests_total", path="/v1/stream", status="499") > 0


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "gpt-9"}, 404, "serves 'smollm2-135m'"),
        ({"n": 0}, 400, "at least 1"),
        ({"n": 1000}, 400, "max_choices"),
        ({"prompt": []}, 400, "empty list"),
        ({"prompt": "a " * 5000}, 400, "context"),
        ({"temperature": -1}, 400, ">= 0.0"),
        ({"guided_regex": "("}, 400, "regex"),
        ({"timeout": 0}, 408, "timed out"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(
    client: StreamClient, change: dict[str, Any], status: int, said: str
) -> None:
    client.start("a", **{**REQUEST, **change})
    _, (done,) = client.rest()
    assert (done["error"]["status"], said in done["error"]["message"]) == (status, True), done


def test_connections_are_counted_and_a_gateway_that_ends_lets_them_finish(
    model_dir: Path, server: RunningServer, whole: str
) -> None:
    with RunningGateway(model_dir, server, shutdown_grace=60) as own, StreamClient(own.url) as client:
        client.start("a", **REQUEST)
        got = client.tokens(1)
        assert own.metric("websocket_connections") == 1
        own.process.terminate()
        assert text_of(got + client.rest()[0]) == whole
        assert own.process.wait(60) in (0, -15)
