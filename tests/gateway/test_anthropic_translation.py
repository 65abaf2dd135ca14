"""From bodies of Anthropic's Messages API to the one internal request."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tidewright_gateway.anthropic.protocol import CountTokensRequest, MessagesRequest
from tidewright_gateway.anthropic.translation import TranslatedRequest, chat_of
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.fields import FieldPolicy
from tidewright_gateway.openai.parsing import parse

USER = {"role": "user", "content": "Hi"}
TOOL = {"name": "f", "description": "Does it", "input_schema": {"type": "object", "properties": {"a": {}}}}
CALL = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": [1, "é"]}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "done"}


def text(of: str) -> dict[str, str]:
    return {"type": "text", "text": of}


def translated(policy: FieldPolicy | None = None, **fields: Any) -> TranslatedRequest:
    body = {"model": "m", "max_tokens": 5, "messages": [USER], **fields}
    return chat_of(parse(MessagesRequest, json.dumps(body).encode(), 99, policy=policy))


def turns(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """As a chat template gets them."""
    request = translated(messages=list(messages), **fields)
    request.sampling()  # which checks the history as chat completions do
    return [message.turn() for message in request.messages]


def test_texts_and_blocks_become_messages() -> None:
    system = {"role": "system", "content": "S"}
    assert turns(USER, system=[text("a"), text("b")]) == [system | {"content": "ab"}, USER]
    assert turns({"role": "user", "content": [text("a"), text("b")]}) == [{"role": "user", "content": "ab"}]
    assert turns(USER, system, USER, system="T") == [{"role": "system", "content": "T"}, USER, system, USER]


def test_consecutive_messages_of_one_role_are_one() -> None:
    answer = {"role": "assistant", "content": "A"}
    assert turns(USER, USER, answer, answer, USER) == [
        {"role": "user", "content": "Hi\nHi"},
        {"role": "assistant", "content": "A\nA"},
        USER,
    ]


def test_calls_and_results_keep_their_order() -> None:
    thinking = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "x"}]
    answer = {"role": "assistant", "content": [*thinking, text("Let me see."), CALL, {**CALL, "id": "c2"}]}
    failed = {"type": "tool_result", "tool_use_id": "c2", "content": [text("no "), text("way")], "is_error": True}
    function = {"name": "f", "arguments": {"a": [1, "é"]}}
    assert turns(USER, answer, {"role": "user", "content": [RESULT, failed, text("And?")]}) == [
        USER,
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": id, "type": "function", "function": function} for id in ("c1", "c2")],
        },
        {"role": "tool", "content": "done", "tool_call_id": "c1"},
        {"role": "tool", "content": "Error: no way", "tool_call_id": "c2"},
        {"role": "user", "content": "And?"},
    ]


def test_sampling_fields_have_their_effect() -> None:
    request = translated(
        temperature=0.5, top_p=0.25, top_k=7, stop_sequences=["a", "b"], stream=True, metadata={"user_id": "u"}
    )
    sampling = request.sampling()
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.25, 7, 5)
    assert sampling.stop_strings == ("a", "b")
    assert (request.stream, request.user) == (True, "u")


@pytest.mark.parametrize(
    ("choice", "forced", "parallel", "names"),
    [
        (None, False, True, {"f", "g"}),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, False, {"f", "g"}),
        ({"type": "any"}, True, True, {"f", "g"}),
        ({"type": "any", "disable_parallel_tool_use": True}, True, False, {"f", "g"}),
        ({"type": "tool", "name": "g"}, True, False, {"g"}),
        ({"type": "none"}, None, None, None),
    ],
)
def test_tool_choices(choice: Any, forced: bool | None, parallel: bool | None, names: set[str] | None) -> None:
    use = translated(tools=[TOOL, {**TOOL, "name": "g", "type": "custom", "strict": True}], tool_choice=choice).tool_use
    if names is None:
        assert use is None
        return
    assert use is not None
    assert (use.is_forced, use.is_parallel, use.names) == (forced, parallel, names)
    assert use.functions[-1].strict
    assert use.functions[-1].parameters == TOOL["input_schema"]
    assert use.functions[-1].description == "Does it"


def test_thinking_and_effort_are_variables_of_the_template() -> None:
    assert "enable_thinking" not in translated().variables
    enabled = translated(thinking={"type": "enabled", "budget_tokens": 1024}, output_config={"effort": "low"})
    assert (enabled.variables["enable_thinking"], enabled.variables["reasoning_effort"]) == (True, "low")
    assert translated(thinking={"type": "disabled"}).variables["enable_thinking"] is False


def test_an_answer_at_the_end_is_continued() -> None:
    assert translated(messages=[USER, {"role": "assistant", "content": "The"}]).variables == {
        "add_generation_prompt": False
    }
    assert translated().variables == {"add_generation_prompt": True}


def test_fields_without_effect_are_told() -> None:
    policy = FieldPolicy()
    cached = {**text("a"), "cache_control": {"type": "ephemeral"}}
    tool = {**TOOL, "cache_control": {"type": "ephemeral"}}
    translated(
        policy,
        messages=[{"role": "user", "content": [cached]}],
        system=[cached],
        tools=[tool],
        service_tier="auto",
        container=None,
    )
    names = ["service_tier", "messages.content.cache_control", "system.cache_control", "tools.cache_control"]
    assert list(policy.ignored) == names


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 1"),
        ({"temperature": 1.5}, "temperature: Input should be less than or equal to 1"),
        ({"temperature": "hot"}, "temperature: Input should be a valid"),
        ({"stop_sequences": [""]}, "stop_sequences: "),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.role must be one of 'user', 'assistant'"),
        (
            {"messages": [{"role": "user", "content": [text("a"), {"type": "image"}]}]},
            "only; messages.0.content.1 is im",
        ),
        (
            {"messages": [{"role": "user", "content": [CALL]}]},
            "messages.0.content.0.type must be one of 'text', 'tool_r",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text is missing"),
        (
            {"messages": [{"role": "user", "content": [RESULT]}]},
            "messages.0.content.0.tool_use_id: no earlier message has a call with the id",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{**CALL, "input": "x"}]}]},
            "messages.1.content.0.input: ",
        ),
        ({"messages": [USER, {"role": "assistant", "content": [CALL]}]}, "messages.1: its tool_use blocks need"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages.1: the last message is an answer with"),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": [CALL]},
                    {"role": "user", "content": [{**RESULT, "content": [{"type": "document"}]}]},
                ]
            },
            "only; messages.2.content.0.content.0 is document",
        ),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 1}]},
            "tools.0.type: only functions can be called here; it must be 'custom', not 'web_search_20250305'",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [CALL, CALL]}, USER]},
            "messages.1.content.1.id: an earlier call without a result has the id",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": [CALL]},
                    {"role": "user", "content": [RESULT, RESULT]},
                ]
            },
            "messages.2.content.1.tool_use_id: the call with the id",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            'tools.0: this is a tool of /v1/chat/completions; in /v1/messages it is {"name": "...", "input_schema": {',
        ),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, "tools.0: this is a tool of /v1/responses"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema is missing"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name: 'f' is the name of an earlier tool"),
        ({"tools": [{**TOOL, "input_schema": {"type": "string"}}]}, "tools.0.input_schema: must be the schema of an"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name: "),
        ({"tool_choice": {"type": "any"}}, "tool_choice asks for a call, but there are no tools"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice.name is missing"),
        ({"tool_choice": {"type": "required"}}, "tool_choice.type must be one of 'auto', 'any', 'tool', 'none'"),
        ({"container": "c"}, "container is not supported: the server runs no code"),
        ({"n": 2}, "unknown or unsupported parameter: n"),
    ],
)
def test_what_is_wrong_is_said_in_its_words(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ApiError) as refused:
        translated(**fields).sampling()
    assert refused.value.status == 400
    assert said in str(refused.value)


def test_tokens_are_counted_without_max_tokens() -> None:
    body = json.dumps({"model": "m", "messages": [USER], "tools": [TOOL], "system": "S"}).encode()
    request = chat_of(parse(CountTokensRequest, body, 99))
    assert [message.text for message in request.messages] == ["S", "Hi"]
    assert [function.name for function in request.offered] == ["f"]
