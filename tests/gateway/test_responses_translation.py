"""A Responses request as the chat request that it means, and what of it is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from helpers.responses import TOOL, parsed
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.openai.fields import FieldPolicy
from tidewright_gateway.openai.messages import InputMessage
from tidewright_gateway.openai.parsing import parse
from tidewright_gateway.openai.responses.items import InputItem
from tidewright_gateway.openai.responses.names import as_sent
from tidewright_gateway.openai.responses.request import ResponsesRequest
from tidewright_gateway.openai.responses.translation import ChatMessage, input_items, messages_of, to_chat
from tidewright_gateway.openai.responses.truncation import shortened

USER = {"role": "user", "content": "Add 1 and 2."}
REASONING = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "3"}
ANSWER = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "phase": "final_answer",
    "content": [{"type": "output_text", "text": "It is 3.", "annotations": [], "logprobs": []}],
}
REFUSAL = {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}


def chat(**fields: Any) -> ChatRequest:
    body = parsed(**fields)
    return to_chat(body, input_items(body))


def turns(*items: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [message.turn() for message in chat(input=list(items), **fields).messages]


def test_a_text_is_a_message_of_the_user_behind_the_instructions() -> None:
    request = chat(input="Hi", instructions="Be short.")
    assert [message.turn() for message in request.messages] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
    ]


def test_messages_are_those_of_their_roles_with_their_parts_joined() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    items = [{"role": role, "content": parts} for role in ("system", "developer", "user")]
    assert turns(*items, ANSWER, USER) == [
        *({"role": role, "content": "ab"} for role in ("system", "developer", "user")),
        {"role": "assistant", "content": "It is 3."},
        USER,
    ]


def test_what_the_model_said_at_a_time_is_one_message() -> None:
    second = {**CALL, "call_id": "c2", "arguments": ""}
    assert turns(USER, REASONING, ANSWER, CALL, second, OUTPUT, {**OUTPUT, "call_id": "c2"}, ANSWER) == [
        USER,
        {
            "role": "assistant",
            "content": "It is 3.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
                {"id": "c2", "type": "function", "function": {"name": "add", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "tool", "content": "3", "tool_call_id": "c2"},
        {"role": "assistant", "content": "It is 3."},
    ]


def test_text_behind_a_call_stays_before_its_output() -> None:
    assert [turn["role"] for turn in turns(USER, CALL, ANSWER, OUTPUT)] == ["user", "assistant", "tool"]
    assert [turn["role"] for turn in turns(USER, ANSWER, ANSWER)] == ["user", "assistant", "assistant"]
    assert [turn["role"] for turn in turns(USER, ANSWER, CALL, ANSWER, OUTPUT)] == ["user", "assistant", "tool"]


def test_a_refusal_is_text_of_the_answer() -> None:
    assert turns(USER, REFUSAL)[1] == {"role": "assistant", "content": "No."}


def test_an_id_may_come_again_once_its_call_has_a_result() -> None:
    assert [turn["role"] for turn in turns(CALL, OUTPUT, CALL, OUTPUT)] == ["assistant", "tool"] * 2


def test_reasoning_belongs_to_what_follows_it() -> None:
    said = turns(USER, ANSWER, REASONING, ANSWER, CALL, REASONING, ANSWER)
    assert [turn.get("reasoning_content") for turn in said] == [None, None, "Hm.", "Hm."]


def test_a_summary_stands_for_reasoning_without_text() -> None:
    summary = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "In short."}]}
    assert turns(USER, summary, ANSWER)[1]["reasoning_content"] == "In short."


_ITEMS = TypeAdapter(list[InputItem])


@given(st.lists(st.sampled_from([USER, REASONING, ANSWER, REFUSAL, CALL, OUTPUT]), min_size=1, max_size=12))
def test_items_come_back_from_the_store_as_the_same_chat(items: list[dict[str, Any]]) -> None:
    given, is_open = items, False
    items = []
    for item in given:
        if item in (CALL, OUTPUT):
            if is_open is (item is CALL):
                continue
            is_open = item is CALL
        items.append(item)
    own = _ITEMS.validate_python([{"type": "message", **item} for item in items])
    again = _ITEMS.validate_python(json.loads(json.dumps([item.shown() for item in own])))
    assert [message.turn() for message in messages_of(again)] == [message.turn() for message in messages_of(own)]


def test_parameters_have_the_names_of_chat_completions() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    request = chat(
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.9,
        stream=True,
        user="u",
        parallel_tool_calls=False,
        tools=[{**TOOL, "strict": True, "description": "Adds."}],
        tool_choice={"type": "function", "name": "add"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}, "verbosity": "low"},
        reasoning={"effort": "low", "summary": "auto"},
        seed=3,
        stop=["x"],
    )
    sampling = request.sampling()
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (7, 0.5, 0.9, 3)
    assert sampling.stop == ["x"]
    assert json.loads(str(sampling.guided_json)) == schema
    assert request.variables["reasoning_effort"] == "low"
    assert (request.stream, request.user) == (True, "u")
    use = request.tool_use
    assert use
    assert (use.is_forced, use.is_parallel, use.is_strict, use.names) == (True, False, True, {"add"})
    assert use.functions[0].description == "Adds."


def test_allowed_tools_are_those_that_are_offered() -> None:
    other = {**TOOL, "name": "other"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
    use = chat(tools=[TOOL, other], tool_choice=allowed).tool_use
    assert use
    assert (use.names, use.is_forced) == ({"other"}, True)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"include": ["reasoning.encrypted_content"]}, None),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, 3),
        ({"top_logprobs": 3}, 3),
        ({"top_logprobs": 0}, None),
    ],
)
def test_log_probabilities_are_asked_for_by_include_or_their_number(fields: dict[str, Any], expected: int) -> None:
    assert chat(**fields).num_logprobs() == expected


def test_fields_without_effect_are_named() -> None:
    policy = FieldPolicy()
    fields = {
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "text": {"verbosity": "low"},
        "reasoning": {"summary": "auto"},
    }
    parse(ResponsesRequest, json.dumps({"model": "m", "input": "Hi", **fields}).encode(), 99, policy=policy)
    assert list(policy.ignored) == ["service_tier", "prompt_cache_key", "text.verbosity", "reasoning.summary"]


HOSTED = ("web_search", "file_search", "code_interpreter", "computer_use_preview", "mcp", "image_generation", "custom")


@pytest.mark.parametrize("kind", HOSTED)
def test_tools_of_other_types_are_refused_by_name(kind: str) -> None:
    for fields in (
        {"tools": [TOOL, {"type": kind, "server_url": "u"}]},
        {"tools": [TOOL], "tool_choice": {"type": kind}},
    ):
        with pytest.raises(ApiError, match=kind) as refused:
            chat(**fields)
        assert (refused.value.status, refused.value.code) == (400, "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"background": True}, "background", "not supported"),
        ({"conversation": "c"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"messages": []}, "messages", "send input"),
        ({"surprise": 1}, "surprise", "unknown"),
        ({"input": []}, "input", "empty"),
        ({"input": ""}, "input", "empty"),
        ({"input": 5}, "input", "string"),
        ({"input": [{"type": "item_reference"}]}, "input.0.id", "missing"),
        ({"input": [{"type": "web_search_call", "id": "w"}]}, "input.0.type", "web_search_call"),
        ({"input": [{"role": "boss", "content": "a"}]}, "input.0.role", "developer"),
        ({"input": [{"role": "user"}]}, "input.0.content", "missing"),
        ({"input": [{"content": "a"}]}, "input.0.type", "missing"),
        ({"input": [USER, {**USER, "surprise": 1}]}, "input.1.surprise", "unknown"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]},
            "input.0.content.0.type",
            "text only; input.0.content.0 is input_image",
        ),
        ({"input": [USER, OUTPUT]}, "input.1.call_id", "no earlier message has a call with the id 'c1'"),
        ({"input": [CALL, OUTPUT, OUTPUT]}, "input.2.call_id", "has a result already"),
        ({"input": [CALL, CALL]}, "input.1.call_id", "an earlier call without a result has the id 'c1'"),
        (
            {"input": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            "input.0.content.0.type",
            "must be one of 'input_text', 'output_text'",
        ),
        ({"input": [{**REFUSAL, "role": "user"}]}, "input.0", "only a message of the assistant"),
        (
            {"input": [CALL, {**OUTPUT, "output": [{"type": "text", "text": "a"}]}]},
            "input.1.output.0.type",
            "'input_text' or 'output_text'",
        ),
        ({"input": [{**CALL, "arguments": "[1]"}]}, "input.0.arguments", "JSON of an object"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "needs schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_schema"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", '{"type": "function", "name": "..."}'),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "missing"),
        (
            {"tools": [TOOL, {"type": "function", "function": {"name": "f"}}]},
            "tools.1",
            'a tool of /v1/chat/completions; in /v1/responses it is {"type": "function", "name"',
        ),
        ({"tools": [{"name": "f", "input_schema": {}}]}, "tools.0", "a tool of /v1/messages"),
        ({"include": ["everything"]}, "include.0", "logprobs"),
        ({"truncation": "some"}, "truncation", "auto"),
        ({"metadata": {"a": "b" * 513}}, "metadata", "512"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata", "at most 16"),
    ],
)
def test_what_is_wrong_is_named_as_it_was_sent(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert said in str(refused.value)


def test_an_item_of_a_previous_response_is_not_said_to_be_in_the_input() -> None:
    body = parsed(input=[OUTPUT])
    previous = _ITEMS.validate_python([{**CALL, "arguments": '{"a":'}])
    with pytest.raises(ApiError) as refused:
        to_chat(body, [*previous, *input_items(body)], 1)
    assert refused.value.param == "previous_response_id"
    previous = _ITEMS.validate_python([CALL])
    assert len(to_chat(body, [*previous, *input_items(body)], 1).messages) == 2


@pytest.mark.parametrize(
    ("param", "message", "theirs", "said"),
    [
        ("max_tokens", "max_tokens is 9, more than 5", "max_output_tokens", "max_output_tokens is 9, more than 5"),
        (
            "ignore_eos",
            "ignore_eos with response_format: drop one",
            "ignore_eos",
            "ignore_eos with text.format: drop one",
        ),
        ("messages", "the prompt has 9 tokens", "input", "the prompt has 9 tokens"),
        ("response_format", "response_format: no schema", "text.format", "text.format: no schema"),
        ("tools.1.function.name", "tools.1.function.name: twice", "tools.1.name", "tools.1.name: twice"),
        ("temperature", "temperature is 3", "temperature", "temperature is 3"),
        (None, "a number is too large", None, "a number is too large"),
    ],
)
def test_errors_about_the_chat_request_have_the_names_of_this_api(
    param: str | None, message: str, theirs: str | None, said: str
) -> None:
    error = as_sent(invalid(message, param))
    assert (error.param, str(error)) == (theirs, said)


def message(role: str, text: str) -> ChatMessage:
    return InputMessage(role=role, content=text)  # type: ignore[arg-type]


@given(room=st.integers(0, 30), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_the_oldest_turns_are_left_out_and_no_more_than_need_be(room: int, lengths: list[int]) -> None:
    head = [message("system", "s")]
    turns = [
        [message("user", str(number)), *[message("developer", "d")] * (length - 1)]
        for number, length in enumerate(lengths)
    ]

    async def fits(messages: list[ChatMessage]) -> bool:
        return len(messages) <= room

    kept = asyncio.run(shortened([*head, *(one for turn in turns for one in turn)], fits))
    enough = (number for number in range(len(turns)) if 1 + sum(map(len, turns[number:])) <= room)
    first = next(enough, len(turns) - 1)
    assert kept == [*head, *(one for turn in turns[first:] for one in turn)]
