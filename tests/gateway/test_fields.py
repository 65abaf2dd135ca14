"""Fields that have an effect, that have none, and that are refused; null is as if the field were not there."""

# ruff: noqa: E501 - the cases are tables
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.answers import USER
from helpers.echo_replica import EchoReplica
from helpers.gateway import RunningGateway
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.fields import FieldPolicy
from tidewright_gateway.openai.parsing import parse
from tidewright_gateway.openai.protocol import CompletionRequest, GenerationBody

REQUIRED: dict[type[GenerationBody], dict[str, Any]] = {
    ChatRequest: {"model": "m", "messages": [USER]},
    CompletionRequest: {"model": "m", "prompt": "a"},
}


def parsed(kind: type[GenerationBody], policy: FieldPolicy | None = None, **fields: Any) -> GenerationBody:
    return parse(kind, json.dumps({**REQUIRED[kind], **fields}).encode(), 99, policy=policy)


def refusal(kind: type[GenerationBody], **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as refused:
        parsed(kind, **fields).sampling()
    return refused.value


@pytest.mark.parametrize("kind", REQUIRED)
def test_null_is_not_given_for_every_field(kind: type[GenerationBody]) -> None:
    names = {field.alias or name for name, field in kind.model_fields.items()} - REQUIRED[kind].keys()
    nulls = dict.fromkeys([*names, *kind.without_effect, *kind.refused, "unheard_of"])
    policy = FieldPolicy()
    assert parsed(kind, policy, **nulls) == parsed(kind)
    assert not policy.ignored


@pytest.mark.parametrize("kind", REQUIRED)
def test_fields_without_effect_are_named(kind: type[GenerationBody]) -> None:
    policy = FieldPolicy()
    body = parsed(
        kind, policy, store=True, metadata={"a": "b"}, stream=True, stream_options={"include_obfuscation": True}
    )
    assert list(policy.ignored) == ["store", "metadata", "stream_options.include_obfuscation"]
    assert body.stream


def test_so_are_those_of_messages_and_tools() -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    policy = FieldPolicy()
    parsed(ChatRequest, policy, messages=[{"role": "user", "content": [part, part], "cache_control": {}}])
    assert list(policy.ignored) == ["messages.cache_control", "messages.content.cache_control"]


def test_nulls_in_schemas_stay() -> None:
    schema = {"type": "object", "properties": {"a": {"const": None}}, "default": None}
    tool = {"type": "function", "function": {"name": "f", "description": None, "parameters": schema}}
    made = parsed(ChatRequest, tools=[tool], guided_json=schema)
    assert isinstance(made, ChatRequest)
    assert made.tools
    assert made.tools[0].function.parameters == made.guided_json == schema


def test_unknown_fields_are_refused_or_ignored() -> None:
    assert refusal(ChatRequest, bogus=1).code == "unknown_parameter"
    policy = FieldPolicy(ignores_unknown=True)
    parsed(ChatRequest, policy, bogus=1, messages=[{**USER, "other": 2}], **{"odd\r\nname": 3, "é": 4})
    assert list(policy.ignored) == ["bogus", "messages.other"]  # what can't stand in a header is not told
    many = FieldPolicy(ignores_unknown=True)
    parsed(ChatRequest, many, **{f"field{number}": 1 for number in range(200)})
    assert len(many.ignored) == 32


@pytest.mark.parametrize(
    ("kind", "fields", "param", "said"),
    [
        (ChatRequest, {"functions": [{"name": "f"}]}, "functions", "use tools"),
        (ChatRequest, {"function_call": "auto"}, "function_call", "use tool_choice"),
        (ChatRequest, {"audio": {"voice": "a"}}, "audio", "text only"),
        (ChatRequest, {"modalities": ["text", "audio"]}, "modalities.1", "text"),
        (CompletionRequest, {"logits_processors": ["a"]}, "logits_processors", "no code"),
        (CompletionRequest, {"suffix": "b"}, "suffix", "''"),
        (CompletionRequest, {"use_beam_search": True}, "use_beam_search", "send n"),
        (ChatRequest, {"temperature": 2.01}, "temperature", "more than 2"),
        (ChatRequest, {"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.1.type",
            "this model takes text only; messages.0.content.1 is image_url",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages.0.content.0.type",
            "messages.0.content.0 is input_audio",
        ),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(
    kind: type[GenerationBody], fields: dict[str, Any], param: str, said: str
) -> None:
    error = refusal(kind, **fields)
    assert (error.status, error.param) == (400, param)
    assert said in str(error)


def test_refused_fields_are_refused_also_where_unknown_ones_are_ignored() -> None:
    with pytest.raises(ApiError, match="use tools"):
        parsed(ChatRequest, FieldPolicy(ignores_unknown=True), functions=[])


def test_minus_one_is_no_limit_and_no_seed() -> None:
    for kind in REQUIRED:
        made = parsed(kind, max_tokens=-1, seed=-1)
        assert made.asked_tokens is None
        assert made.sampling().seed is None
    assert refusal(ChatRequest, max_tokens=-2).param == "max_tokens"
    assert refusal(ChatRequest, max_tokens=0).param == "max_tokens"


def test_a_prompt_can_be_echoed_without_an_answer() -> None:
    made = parsed(CompletionRequest, echo=True, max_tokens=0, logprobs=1)
    assert made.sampling().max_tokens == 1
    assert made.sampling().prompt_logprobs == 1
    assert refusal(CompletionRequest, max_tokens=0).param == "max_tokens"


def test_structured_outputs_are_the_guided_ones() -> None:
    assert parsed(ChatRequest, structured_outputs={"choice": ["a", "b"]}).sampling().guided_choice == ["a", "b"]
    assert parsed(ChatRequest, structured_outputs={"json_object": True}).sampling().guided_json == '{"type": "object"}'
    assert parsed(ChatRequest, structured_outputs={"regex": "a+"}).sampling().guided_regex == "a+"


def test_defaults_of_the_model_stand_behind_what_the_request_says() -> None:
    defaults = {"temperature": 0.5, "top_k": 7}
    made = parsed(ChatRequest, temperature=0.25).sampling(defaults)
    assert (made.temperature, made.top_k) == (0.25, 7)


def test_an_object_has_a_bound() -> None:
    error = refusal(ChatRequest, messages=[{**USER, **{f"f{number}": 1 for number in range(300)}}])
    assert error.code == "too_many_items"


def test_a_header_names_what_had_no_effect(echo_gateway: RunningGateway) -> None:
    for stream in (False, True):
        body = {"prompt": "Hi", "max_tokens": 2, "store": True, "logit_bias": None, "metadata": {"a": "b"}}
        answer = echo_gateway.post("/v1/completions", {**body, "stream": stream})
        assert (answer.status_code, answer.headers["X-Ignored-Fields"]) == (200, "store, metadata")
    assert "X-Ignored-Fields" not in echo_gateway.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2}).headers
    assert echo_gateway.post("/v1/completions", {"prompt": "Hi", "bogus": 1}).status_code == 400


def test_unknown_fields_are_ignored_where_the_operator_says_so(model_dir: Path, echo: EchoReplica) -> None:
    with RunningGateway(model_dir, echo, unknown_fields="ignore") as gateway:
        answer = gateway.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "bogus": 1})
        assert (answer.status_code, answer.headers["X-Ignored-Fields"]) == (200, "bogus")
