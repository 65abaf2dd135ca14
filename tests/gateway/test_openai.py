"""The official OpenAI client, and bad input, against a real gateway in front of a real Triton."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from helpers.gateway import MODEL, RunningGateway
from helpers.triton import RunningServer

CHAT = [{"role": "user", "content": "Name three fruits."}]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def gateway(model_dir: Path, server: RunningServer) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, server, max_body=100_000) as running:
        yield running


def test_a_chat_is_the_same_whole_and_streamed_and_as_triton_gives_it(
    gateway: RunningGateway, server: RunningServer
) -> None:
    options = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": 24}
    gateway.openai.chat.completions.create(**options)  # now the engine has the prompt's blocks, whatever ran before
    whole = gateway.openai.chat.completions.create(**options)
    pieces = list(
        gateway.openai.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    direct = server.generate(
        "generate",
        messages=json.dumps(CHAT),
        sampling_parameters={"temperature": 0, "max_tokens": 24},
        exclude_input_in_output=True,
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert whole.choices[0].message.content == text == direct.text
    assert whole.choices[0].finish_reason == pieces[-2].choices[0].finish_reason
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices == []
    assert pieces[-1].usage == whole.usage
    assert whole.usage.completion_tokens == len(direct.token_ids)
    assert whole.usage.prompt_tokens == gateway.post("/tokenize", {"messages": CHAT}).json()["count"]
    assert len({piece.id for piece in pieces}) == 1
    assert pieces[0].id.startswith("chatcmpl-")


def test_prompts_as_text_as_ids_and_as_lists(gateway: RunningGateway) -> None:
    ids = gateway.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    assert gateway.post("/detokenize", {"tokens": ids}).json() == {"prompt": PROMPT}

    def ask(prompt: object, **options: object) -> list[str]:
        got = gateway.openai.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=8, **options)
        assert [choice.index for choice in got.choices] == list(range(len(got.choices)))
        return [choice.text for choice in got.choices]

    (answer,) = ask(PROMPT)
    (other,) = ask("Once upon a time")
    assert "Paris" in answer
    assert ask(ids) == [answer]
    assert ask([PROMPT, "Once upon a time"]) == [answer, other]
    assert ask([ids, ids]) == [answer, answer]
    assert ask(PROMPT, echo=True) == [PROMPT + answer]
    assert ask([PROMPT, "Once upon a time"], n=2, seed=1) == [answer, answer, other, other]


def test_several_choices_stream_beside_each_other_and_differ_by_their_seed(gateway: RunningGateway) -> None:
    options = {
        "model": MODEL,
        "prompt": "Once",
        "n": 3,
        "seed": 7,
        "max_tokens": 12,
        "extra_body": {"ignore_eos": True},
    }
    whole = [choice.text for choice in gateway.openai.completions.create(**options).choices]
    streamed = ["", "", ""]
    for piece in gateway.openai.completions.create(**options, stream=True):
        streamed[piece.choices[0].index] += piece.choices[0].text
    assert streamed == whole
    assert len(set(whole)) == 3
    alone = gateway.openai.completions.create(**{**options, "n": 1, "seed": 8}).choices[0].text
    assert alone == whole[1]


def test_stop_bias_and_extensions_have_their_effect(gateway: RunningGateway) -> None:
    def ask(**options: object) -> openai.types.CompletionChoice:
        return gateway.openai.completions.create(model=MODEL, prompt=PROMPT, temperature=0, **options).choices[0]

    plain = ask(max_tokens=8)
    assert plain.finish_reason == "length"
    stopped = ask(max_tokens=8, stop=["Paris"])
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.text.partition("Paris")[0]
    (token_id,) = gateway.post("/tokenize", {"prompt": " Paris"}).json()["tokens"]
    assert "Paris" not in ask(max_tokens=8, logit_bias={str(token_id): -100}).text
    assert ask(max_tokens=8, extra_body={"guided_choice": ["Rome", "Lima"]}).text in ("Rome", "Lima")
    assert ask(max_tokens=8, extra_body={"bad_words": ["Paris"]}).text != plain.text


def test_logprobs_name_the_tokens_of_the_text(gateway: RunningGateway) -> None:
    chat = gateway.openai.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    ).choices[0]
    assert "".join(entry.token for entry in chat.logprobs.content) == chat.message.content
    for entry in chat.logprobs.content:
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert bytes(entry.bytes).decode() == entry.token
    text = gateway.openai.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=6, logprobs=2)
    found = text.choices[0].logprobs
    for token, offset, top in zip(found.tokens, found.text_offset, found.top_logprobs, strict=True):
        assert text.choices[0].text[offset:].startswith(token)
        assert len(top) == 2


def test_an_answer_follows_a_json_schema(gateway: RunningGateway) -> None:
    schema = {
        "type": "object",
        "properties": {"fruit": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "maximum": 9}},
        "required": ["fruit", "count"],
        "additionalProperties": False,
    }
    got = gateway.openai.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "fruit", "schema": schema}},
    )
    assert set(json.loads(got.choices[0].message.content)) == {"fruit", "count"}


def test_models_and_health(gateway: RunningGateway) -> None:
    assert [model.id for model in gateway.openai.models.list()] == [MODEL]
    assert gateway.openai.models.retrieve(MODEL).id == MODEL
    assert gateway.http.get("/health/ready").status_code == 200
    assert gateway.http.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]
    assert gateway.http.get("/v1/models").json()["data"][0]["max_model_len"] == 4096  # the replica's, not the model's


@pytest.mark.parametrize(
    ("change", "status", "param", "said"),
    [
        ({"model": "gpt-9"}, 404, "model", "serves 'smollm2-135m'"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": [{"role": "boss", "content": "Hi"}]}, 400, "messages.0.role", "'user'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.0.content.0.type",
            "text",
        ),
        ({"temperature": -1}, 400, "temperature", ">= 0.0"),
        ({"temperature": "hot"}, 400, None, "valid"),
        ({"max_tokens": 0}, 400, "max_tokens", ">= 1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "differ"),
        ({"max_tokens": 100_000}, 400, "max_tokens", "more than the model's context of 4096"),
        ({"n": 1000}, 400, "n", "max_choices"),
        ({"n": 0}, 400, "n", "at least 1"),
        ({"tool": []}, 400, "tool", "unknown or unsupported parameter: tool"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "needs json_schema"),
        ({"guided_regex": "("}, 400, None, "regex"),
        ({"stop": [""]}, 400, "stop", "length >= 1"),
        ({"stream": True, "stop": [""]}, 400, "stop", "length >= 1"),
        ({"timeout": 0}, 408, None, "timed out"),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, 400, None, "context"),
    ],
)
def test_what_is_wrong_is_said(
    gateway: RunningGateway, change: dict, status: int, param: str | None, said: str
) -> None:
    response = gateway.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 4, **change})
    error = response.json()["error"]
    assert (response.status_code, said in error["message"]) == (status, True), error
    if param:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff\xfe{}", "application/json", 400),
        (b"[" * 50_000, "application/json", 400),
        (b"[]", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b" " * 200_000, "application/json", 413),
    ],
)
def test_a_body_that_is_none_is_refused_and_the_gateway_goes_on(
    gateway: RunningGateway, content: bytes, kind: str, status: int
) -> None:
    response = gateway.http.post("/v1/completions", content=content, headers={"Content-Type": kind})
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    in_pieces = (content[at : at + 1000] for at in range(0, len(content), 1000))  # without a Content-Length
    assert gateway.http.post("/v1/completions", content=in_pieces, headers={"Content-Type": kind}).status_code == status
    assert gateway.is_live()


def test_the_caller_s_request_id_comes_back(gateway: RunningGateway) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1}
    assert gateway.post("/v1/completions", body, headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
    strange = gateway.post("/v1/completions", body, headers={"X-Request-Id": "a b"}).headers["x-request-id"]
    assert len(strange) == 24
    assert gateway.http.get("/nowhere").headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_engine(gateway: RunningGateway, server: RunningServer, stream: bool) -> None:
    server.wait_idle()
    left = gateway.metric("requests_total", status="499")
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    with httpx.Client(trust_env=False, timeout=120) as leaving:
        if stream:
            with leaving.stream("POST", f"{gateway.url}/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post(f"{gateway.url}/v1/completions", json=body, timeout=0.5)
    before = server.metric("generated_tokens_total")
    server.wait_idle()
    assert server.metric("generated_tokens_total") - before < 2000
    deadline = time.monotonic() + 60
    while gateway.metric("requests_active") > 1:  # the one that asks
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert gateway.metric("requests_total", status="499") - left == (not stream)  # a stream had begun with 200


def test_metrics_count_what_was_done(gateway: RunningGateway) -> None:
    before = {name: gateway.metric(name) for name in ("requests_total", "tokens_total", "overhead_seconds_count")}
    gateway.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True})
    num_prompt = gateway.post("/tokenize", {"prompt": PROMPT}).json()["count"]
    assert gateway.metric("tokens_total") - before["tokens_total"] == 5 + num_prompt
    assert gateway.metric("overhead_seconds_count") - before["overhead_seconds_count"] == 1
    assert gateway.metric("requests_total", path="/v1/completions", status="200") > 0
    assert gateway.metric("replica_up") == 1
