"""The OpenAPI document: it is valid, its names are stable, and every answer is what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openapi_spec_validator
import pytest

from helpers.answers import chat_answer, completion_answer, context_of
from helpers.described import Conformance
from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from helpers.responses import TOOL, answer_of
from tidewright.tokenization import Tokenizer
from tidewright_gateway.anthropic.answer import MessagesAnswer
from tidewright_gateway.config.api import ApiSettings
from tidewright_gateway.openai.answers import Answer
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.dialect import Dialect
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.rendering import Events, WholeAnswer
from tidewright_gateway.replicas.triton import Reply

IDS = (
    "cancelResponse countTokens createChatCompletion createCompletion createEmbedding createMessage createResponse "
    "createScore deleteResponse detokenize drainReplica getHealth getLiveness getMetrics getModel getReadiness "
    "getResponse getStatus getVersion listInputItems listModels loadLoraAdapter loadModel tokenize "
    "unloadLoraAdapter unloadModel"
)
LOGPROBS = "message.output_text.logprobs"
CHAT = [{"role": "user", "content": "Hi"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
EXTRAS = {"n": 2, "return_token_ids": True, "prompt_logprobs": 1, "max_tokens": 3, "stop": ["nothing"]}
ANTHROPIC = {"anthropic-version": "2023-06-01"}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
THOUGHT_AND_CALL = list(f"<think>\nHm.\n</think>\n\nLet me see. {CALL}")
USAGE = {"include_usage": True, "continuous_usage_stats": True}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 3}),
    ("/v1/chat/completions", {"messages": CHAT, "logprobs": True, "top_logprobs": 1, **EXTRAS}),
    ("/v1/chat/completions", {"messages": CHAT, "stream": True, "max_tokens": 3, "timeout": 0.0001}),
    (
        "/v1/chat/completions",
        {"messages": CHAT, "stream": True, "max_tokens": 3, "stream_options": USAGE, "return_token_ids": True, "n": 2},
    ),
    ("/v1/chat/completions", {"messages": CHAT, "stream": True, "max_tokens": 3, "logprobs": True}),
    ("/v1/chat/completions", {"messages": IMAGE}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 3}),
    ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 1, "echo": True, **EXTRAS}),
    ("/v1/completions", {"prompt": "a", "logprobs": 0, "max_tokens": 0, "echo": True}),
    ("/v1/completions", {"prompt": "a", "stream": True, "stream_options": USAGE, "return_token_ids": True}),
    ("/v1/completions", {"prompt": "a", "stream": True, "echo": True, "logprobs": 2}),
    ("/v1/completions", {"prompt": "a", "temperature": 9}),
    ("/v1/embeddings", {"input": ["a", "b"]}),
    ("/v1/score", {"text_1": "a"}),
    ("/v1/messages", {"messages": CHAT, "max_tokens": 3}),
    ("/v1/messages", {"messages": CHAT, "max_tokens": 3, "stream": True}),
    ("/v1/messages", {"messages": CHAT}),
    ("/v1/messages/count_tokens", {"messages": CHAT}),
    ("/v1/messages/count_tokens", {"messages": IMAGE}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 3}),
    (
        "/v1/responses",
        {
            "input": "Hi",
            "max_output_tokens": 3,
            "top_logprobs": 1,
            "tools": [TOOL],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]},
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
            "metadata": {"a": "b"},
            "user": "someone",
        },
    ),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 3, "stream": True}),
    (
        "/v1/responses",
        {"input": "Hi", "max_output_tokens": 3, "stream": True, "include": [LOGPROBS]},
    ),
    ("/v1/responses", {"input": "Hi", "background": True}),
    ("/tokenize", {"prompt": "a"}),
    ("/tokenize", {}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/detokenize", {"tokens": [-1]}),
]
GETS: list[tuple[str, str, dict[str, str]]] = [
    ("/v1/models", "/v1/models", {}),
    ("/v1/models", "/v1/models", ANTHROPIC),
    ("/v1/models", "/v1/models?after_id=x", ANTHROPIC),
    ("/v1/models", "/v1/models?limit=0", {}),
    ("/v1/models", "/v1/models?limit=0", ANTHROPIC),
    ("/v1/models/{name}", f"/v1/models/{MODEL}", {}),
    ("/v1/models/{name}", f"/v1/models/{MODEL}", ANTHROPIC),
    ("/v1/models/{name}", "/v1/models/other", {}),
    ("/health", "/health", {}),
    ("/health/live", "/health/live", {}),
    ("/health/ready", "/health/ready", {}),
    ("/version", "/version", {}),
    ("/metrics", "/metrics", {}),
    ("/admin/status", "/admin/status", {}),
]


@pytest.fixture(scope="module")
def document(echo_gateway: RunningGateway) -> dict[str, Any]:
    found: dict[str, Any] = echo_gateway.http.get("/openapi.json").json()
    return found


@pytest.fixture(scope="module")
def conformance(document: dict[str, Any]) -> Conformance:
    return Conformance(document)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_it_is_valid_and_its_names_are_those_that_generated_clients_call(document: dict[str, Any]) -> None:
    openapi_spec_validator.validate(document)
    assert sorted(one["operationId"] for _, _, one in operations(document)) == IDS.split()
    assert [name for name in document["components"]["schemas"] if not name.isalnum()] == []  # two had the same name
    tags = {tag["name"] for tag in document["tags"]}
    assert {tag for _, _, one in operations(document) for tag in one["tags"]} == tags
    schemes = [name for entry in document["security"] for name in entry]
    assert schemes == list(document["components"]["securitySchemes"]) == ["bearer", "apiKey"]
    assert {} in document["security"]  # a gateway may ask for no keys
    public = [path for _, path, one in operations(document) if one.get("security") == []]
    assert public == ["/health/live", "/health/ready", "/health"]


def test_every_answer_is_as_it_says(echo_gateway: RunningGateway, conformance: Conformance) -> None:
    for path, body in BODIES:
        conformance.check("post", path, echo_gateway.post(path, body))
    for path, url, headers in GETS:
        conformance.check("get", path, echo_gateway.http.get(url, headers=headers))
    wrong = {"replica": "nowhere"}
    conformance.check("post", "/admin/drain", echo_gateway.http.post("/admin/drain", json=wrong))
    expected = {("post", path, kind) for path, _ in BODIES for kind in ("whole", "error")}
    expected |= {("post", path, "stream") for path, body in BODIES if body.get("stream")}
    expected |= {("get", path, "whole") for path, _, _ in GETS} | {("post", "/admin/drain", "error")}
    others = {("post", "/v1/embeddings", "whole"), ("post", "/v1/score", "whole")}  # below
    assert expected - others <= conformance.seen


def test_stored_responses_are_as_it_says(echo_gateway: RunningGateway, conformance: Conformance) -> None:
    http, path = echo_gateway.http, "/v1/responses/{response_id}"
    call = {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}
    given = [
        {"role": "system", "content": "Be short."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        call,
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "1"}]},
        {"role": "user", "content": "Hi"},
    ]
    first = echo_gateway.post("/v1/responses", {"input": given, "max_output_tokens": 3}).json()["id"]
    more = {"input": "Hi", "previous_response_id": first, "max_output_tokens": 3}
    url = f"/v1/responses/{echo_gateway.post('/v1/responses', more).json()['id']}"
    conformance.check("get", path, http.get(url))
    conformance.check("get", f"{path}/input_items", found := http.get(f"{url}/input_items"))
    assert len(found.json()["data"]) == len(given) + 2  # with the first answer
    conformance.check("post", f"{path}/cancel", http.post(f"{url}/cancel"))
    conformance.check("delete", path, http.delete(url))
    for method, end in (("get", ""), ("get", "/input_items"), ("delete", "")):
        conformance.check(method, path + end, http.request(method.upper(), url + end))  # there is none any more


def test_what_embeds_drains_and_is_not_ready_is_as_it_says(model_dir: Path, conformance: Conformance) -> None:
    with EchoReplica() as replica:
        replica.status = msgspec.structs.replace(replica.status, embedding_size=4)
        with RunningGateway(model_dir, replica) as gateway:
            for options in ({}, {"encoding_format": "base64"}):
                answer = gateway.post("/v1/embeddings", {"input": ["a", "b"], **options})
                assert answer.status_code == 200
                conformance.check("post", "/v1/embeddings", answer)
            answer = gateway.post("/v1/score", {"text_1": "a", "text_2": ["b", "c"]})
            assert answer.status_code == 200
            conformance.check("post", "/v1/score", answer)
            answer = gateway.http.post("/admin/drain", json={})
            assert answer.status_code == 200
            conformance.check("post", "/admin/drain", answer)
            for path in ("/health", "/health/ready"):
                answer = gateway.http.get(path)
                assert answer.status_code == 503  # its only replica drains
                conformance.check("get", path, answer)


def made(answer: Answer, replies: list[Reply], *, is_streamed: bool) -> bytes:
    made = Events(answer, 1) if is_streamed else WholeAnswer(answer, 1)
    written = b""
    for reply in replies:
        answer._context.take(0, reply)
        written += made.take(0, reply) or b""
    return made.body() if isinstance(made, WholeAnswer) else written


def replies(pieces: list[str], reason: str) -> list[Reply]:
    entry = msgspec.json.encode([{"7": {"logprob": -0.5, "rank": 1, "decoded_token": "x"}}])
    prompt = msgspec.json.encode([None])
    found = [Reply(piece, [7], None, entry) for piece in pieces[:-1]]
    return [*found, Reply(pieces[-1], [7], reason, entry, prompt_logprobs=prompt)]


@pytest.mark.parametrize("reason", ["stop", "length", "timeout"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_thoughts_calls_and_early_ends_are_as_it_says(
    tokenizer: Tokenizer, conformance: Conformance, reason: str, is_streamed: bool
) -> None:
    context = context_of()
    context.limited_by = "tokens_per_minute"
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    options = {"logprobs": True, "top_logprobs": 1, "stream": is_streamed}
    of_prompt = {} if is_streamed else {"prompt_logprobs": 1}
    api = {"reasoning": "think"}
    thinking = Dialect(tokenizer, ApiSettings(reasoning="think"))
    request = ChatRequest.model_validate({"model": "m", "messages": CHAT, "tools": [tool]})
    answers = {
        "ChatCompletion": chat_answer(tokenizer, context, api, tools=[tool], **of_prompt, **options),
        "Completion": completion_answer(tokenizer, context, stream=is_streamed, logprobs=1, **of_prompt),
        "AnthropicMessage": MessagesAnswer(context, request, thinking),
        "ResponseObject": answer_of(tokenizer, thinks=True, tools=[TOOL], top_logprobs=1, stream=is_streamed),
    }
    events = {"ChatCompletion": "ChatCompletionChunk", "Completion": "CompletionChunk"}
    events |= {"AnthropicMessage": "MessageEvent", "ResponseObject": "ResponseEvent"}
    for name, answer in answers.items():
        written = made(answer, replies(THOUGHT_AND_CALL, reason), is_streamed=is_streamed)
        if is_streamed:
            conformance.check_events(written, events[name])
            error = "AnthropicError" if name == "AnthropicMessage" else "ErrorBody"
            failure = answer.failure(ApiError(503, "gone", code="engine_failed"))
            conformance.check_events(failure, events[name], error)
        else:
            found = json.loads(written)
            conformance.check_object(found, name)
            if reason == "timeout" and name != "AnthropicMessage":
                assert "timeout" in written.decode()
            assert "add" in written.decode()


def test_the_check_finds_fields_that_nobody_described(conformance: Conformance) -> None:
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    conformance.check_object(usage, "PromptUsage")
    for wrong in ({**usage, "more": 1}, {"prompt_tokens": 1}, {**usage, "total_tokens": None}):
        with pytest.raises(AssertionError):
            conformance.check_object(wrong, "PromptUsage")
    inner = {"object": "list", "model": "m", "usage": usage}
    for data in ([{"object": "embedding", "index": 0, "embedding": [1], "more": 1}], {}):
        with pytest.raises(AssertionError):
            conformance.check_object({**inner, "data": data}, "EmbeddingList")
    with pytest.raises(AssertionError):
        conformance.check_events(b'data: {"type": "message_stop", "more": 1}\n\n', "MessageEvent")


def test_it_costs_nothing_until_somebody_asks() -> None:
    """A gateway starts without the models of answers."""
    text = (
        "import sys, tidewright_gateway.http.application; "
        "print([name for name in sys.modules if name.startswith('tidewright_gateway.document')])"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
