"""Requests with tools: which are taken, what the model is told of them, and what becomes of its calls."""

# ruff: noqa: E501 - the cases are tables
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.answers import USER, chat_answer
from tidewright.chat_template import ChatTemplate
from tidewright.schema import SamplingParams
from tidewright.tokenization import Tokenizer
from tidewright_gateway.config.api import ApiSettings
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.dialect import Dialect
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.parsing import parse
from tidewright_gateway.replicas.triton import Reply

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "22 C"}
ASKED = [{"role": "assistant", "tool_calls": [CALL]}]
NAMED = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer(model_dir)


def chat(**fields: Any) -> ChatRequest:
    made = parse(ChatRequest, json.dumps({"model": "m", "messages": [USER], **fields}).encode(), 5000)
    made.sampling()
    _ = made.tool_use
    return made


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": [WEATHER, CLOCK]}, (["weather", "clock"], False, True)),
        ({"tools": [WEATHER, CLOCK], "tool_choice": "auto", "parallel_tool_calls": False}, (["weather", "clock"], False, False)),
        ({"tools": [WEATHER, CLOCK], "tool_choice": "required"}, (["weather", "clock"], True, True)),
        ({"tools": [WEATHER, CLOCK], "tool_choice": NAMED}, (["clock"], True, False)),
        (
            {"tools": [WEATHER, CLOCK], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}},
            (["clock"], True, True),
        ),
        ({"tools": [WEATHER], "tool_choice": "none"}, None),
        ({"tools": []}, None),
        ({"tools": None, "tool_choice": None}, None),
        ({"tool_choice": "none"}, None),
        ({"tools": [], "tool_choice": "auto"}, None),
    ],
)  # fmt: skip
def test_what_the_model_may_call(fields: dict[str, Any], expected: Any) -> None:
    use = chat(**fields).tool_use
    assert (use and ([one.name for one in use.functions], use.is_forced, use.is_parallel)) == expected


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.function.name"),
        ({"tools": [function(name=f"f{number}") for number in range(129)]}, "tools"),
        ({"tools": [function()] * 1000}, "tools"),
        ({"tools": [function(name="a b")]}, "tools.0.function.name"),
        ({"tools": [function(name="")]}, "tools.0.function.name"),
        ({"tools": [function(name="é")]}, "tools.0.function.name"),
        ({"tools": [function(name="a" * 65)]}, "tools.0.function.name"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools.0.function.parameters"),
        ({"tools": [function(parameters="{}")]}, "tools.0.function.parameters"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": "weather"}, "tools"),
        ({"tools": [WEATHER, {"type": "function", "name": "f", "parameters": {}}]}, "tools.1"),
        ({"tools": [{"name": "f", "input_schema": {}}]}, "tools.0"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}}, "tool_choice"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL, CALL]}]}, "messages.0.tool_calls.1.id"),
        ({"messages": [*ASKED, ASKED[0]]}, "messages.1.tool_calls.0.id"),
        ({"messages": [*ASKED, RESULT, RESULT]}, "messages.2.tool_call_id"),
        ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "a"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "user": "a", "content": "a"}]}, "messages.0.user"),
        ({"messages": [USER, {"role": "tool", "content": "5"}]}, "messages.1.tool_call_id"),
        ({"messages": [USER, {"role": "tool", "content": "5", "tool_call_id": "c1"}]}, "messages.1.tool_call_id"),
        (
            {"messages": [USER, {"role": "tool", "content": "5", "tool_call_id": "c1"}, {"role": "assistant", "tool_calls": [CALL]}]},
            "messages.1.tool_call_id",
        ),
        *(
            (
                {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": text}}]}]},
                "messages.0.tool_calls.0.function.arguments",
            )
            for text in ("{", "5", "[]", '"a"', "nothing", "[" * 5000)
        ),
    ],
)  # fmt: skip
def test_what_can_t_be_is_said(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_what_is_said_of_other_apis_forms() -> None:
    with pytest.raises(ApiError, match=r'of /v1/responses; in /v1/chat/completions it is \{"type": "function", "fun'):
        chat(tools=[{"type": "function", "name": "f"}])
    with pytest.raises(ApiError, match=r'^tool_choice must be "none", .*"allowed_tools"'):
        chat(tools=[WEATHER], tool_choice={"type": "any"})
    with pytest.raises(ApiError, match=r"^messages\.0\.content\.0\.type must be 'text', not 'input_text'"):
        chat(messages=[{"role": "user", "content": [{"type": "input_text", "text": "a"}]}])


def test_a_refusal_is_text_of_the_answer() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    assert chat(messages=[{"role": "assistant", "content": parts}, USER]).messages[0].text == "ab"


def test_an_id_may_come_again_once_its_call_has_a_result() -> None:
    assert len(chat(messages=[*ASKED, RESULT, *ASKED, RESULT]).messages) == 4


HISTORY = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    RESULT,
    {"role": "user", "content": "Thanks"},
]


def dialect(tokenizer: Tokenizer, template: str, **settings: Any) -> Dialect:
    made = Tokenizer.__new__(Tokenizer)
    made.__dict__.update(tokenizer.__dict__)
    made.chat_template = ChatTemplate(template, {})
    return Dialect(made, ApiSettings(**settings))


def turns(made: Dialect, **fields: Any) -> list[dict[str, Any]]:
    request = chat(**fields)
    return made.turns([message.turn() for message in request.messages], request.offered)


def test_a_template_that_knows_tools_gets_them_as_they_are(tokenizer: Tokenizer) -> None:
    found = turns(dialect(tokenizer, "{{ tools }}"), messages=HISTORY, tools=[WEATHER])
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    assert found[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert found[2] == {"role": "tool", "content": "22 C", "tool_call_id": "c1"}


@pytest.mark.parametrize("tool_format", ["auto", "hermes", "llama3_json", "mistral", "pythonic"])
def test_one_that_does_not_gets_a_text(tokenizer: Tokenizer, tool_format: Any) -> None:
    made = dialect(tokenizer, "{{ messages }}", tool_format=tool_format)
    found = turns(made, messages=HISTORY, tools=[WEATHER, CLOCK])
    assert [turn["role"] for turn in found] == ["system", "user", "assistant", "user"]
    assert json.dumps(PARAMETERS) in found[0]["content"]
    assert made.tool_format.instruction in found[0]["content"]
    call = {"name": "weather", "arguments": {"city": "Köln"}}
    assert found[2] == {"role": "assistant", "content": made.tool_format.text([call])}
    assert found[3]["content"] == "<tool_response>\n22 C\n</tool_response>\nThanks"


def test_the_text_stands_behind_a_system_message(tokenizer: Tokenizer) -> None:
    system = {"role": "system", "content": "Be brief."}
    found = turns(dialect(tokenizer, "x"), messages=[system, USER], tools=[WEATHER])
    assert found[0]["content"].startswith("Be brief.\n\nYou can call")
    assert turns(dialect(tokenizer, "x"), messages=[system, USER], tools=[WEATHER], tool_choice="none") == [
        system,
        USER,
    ]


def test_developer_messages_are_system_messages_where_the_template_lacks_them(tokenizer: Tokenizer) -> None:
    developer = {"role": "developer", "content": "a"}
    assert turns(dialect(tokenizer, "x"), messages=[developer])[0]["role"] == "system"
    assert turns(dialect(tokenizer, "{{ 'developer' }}"), messages=[developer])[0]["role"] == "developer"


def test_the_model_s_sampling_parameters_are_taken_where_that_is_asked_for(tokenizer: Tokenizer) -> None:
    tokenizer.sampling_defaults = {"temperature": 0.5}
    for setting, temperature in (("none", 1.0), ("model", 0.5)):
        defaults = dialect(tokenizer, "x", generation_config=setting).defaults
        assert chat().sampling(defaults).temperature == temperature


def test_which_grammar_a_request_gets(tokenizer: Tokenizer) -> None:
    made = dialect(tokenizer, "x")

    def guided(**fields: Any) -> SamplingParams:
        request = chat(**fields)
        return made.guide(request.sampling(), request.tool_use)

    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    json_answer = {"response_format": {"type": "json_object"}}
    assert not guided(tools=[WEATHER]).guided
    assert guided(tools=[WEATHER], tool_choice="required", stop=["city"]).stop is None
    assert guided(tools=[WEATHER], stop=["city"]).stop == ["city"]
    assert "call_0" in (guided(tools=[WEATHER], tool_choice="required").guided_grammar or "")
    assert "TEXT" in (guided(tools=[strict]).guided_grammar or "")
    both = guided(tools=[WEATHER], **json_answer)
    assert both.guided_json is None
    assert "%json" in (both.guided_grammar or "").splitlines()[0]
    assert guided(tools=[WEATHER], tool_choice="none", **json_answer).guided_json
    for fields in ({"tools": [WEATHER], "guided_regex": "a"}, {"tools": [WEATHER], "guided_choice": ["a"]}):
        with pytest.raises(ApiError, match="exclude each other"):
            guided(**fields)
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(ApiError, match=r"no JSON schema|characters"):
        guided(tools=[function(parameters=deep)], tool_choice="required")
    with pytest.raises(ApiError, match="characters"):
        guided(tools=[function(parameters={"type": "object", "title": "a" * 70_000})], tool_choice="required")


TEXT = 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def replies(text: str, reason: str, size: int = 3) -> list[Reply]:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    return [Reply(piece, [5], reason if at == len(pieces) - 1 else None, None) for at, piece in enumerate(pieces)]


def test_calls_are_in_the_message_and_in_deltas(tokenizer: Tokenizer) -> None:
    whole, streamed = (chat_answer(tokenizer, tools=[WEATHER]) for _ in range(2))
    kept, choice = whole.choice(0, is_streamed=False), streamed.choice(0, is_streamed=True)
    deltas: list[dict[str, Any]] = []
    for reply in replies(TEXT, "stop"):
        kept.take(reply)
        for line in streamed.piece(choice, choice.take(reply)).splitlines():
            if line:
                deltas.append(json.loads(line.removeprefix(b"data: "))["choices"][0])
    made = json.loads(whole.whole([kept]))["choices"][0]
    call = made["message"]["tool_calls"][0]
    assert call == {
        "id": call["id"],
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Köln"}'},
    }
    assert made["message"]["content"] == "Let me look."
    assert made["finish_reason"] == deltas[-1]["finish_reason"] == "tool_calls"
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == "Let me look."
    parts = [part for delta in deltas for part in delta["delta"].get("tool_calls", ())]
    assert parts[0]["function"]["name"] == "weather"
    assert parts[0]["id"]
    assert {part["index"] for part in parts} == {0}
    assert sum("id" in part for part in parts) == 1
    assert "".join(part["function"]["arguments"] for part in parts) == '{"city": "Köln"}'
    assert len(parts) > 3  # as they come


def test_an_answer_that_is_cut_ends_with_length(tokenizer: Tokenizer) -> None:
    for reason, ended_by in (("length", None), ("timeout", "timeout")):
        answer = chat_answer(tokenizer, tools=[WEATHER])
        choice = answer.choice(0, is_streamed=False)
        for reply in replies(TEXT[:-20], reason):
            choice.take(reply)
        made = json.loads(answer.whole([choice]))["choices"][0]
        assert made["finish_reason"] == "length"
        assert made.get("ended_by") == ended_by


def test_a_call_that_a_stop_text_cut_is_no_whole_call(tokenizer: Tokenizer) -> None:
    for text, reason in ((TEXT[:-20], "stop"), (TEXT, "tool_calls")):
        choice = chat_answer(tokenizer, tools=[WEATHER]).choice(0, is_streamed=False)
        made = replies(text, "stop")
        for reply in [*made[:-1], replace(made[-1], stop_reason="x")]:
            choice.take(reply)
        assert choice.finish_reason == reason


@pytest.mark.parametrize("text", ["<", "<tool_call>", TEXT[:30], f"{TEXT}\n<tool_call>"])
def test_a_forced_call_that_is_cut_is_no_text(tokenizer: Tokenizer, text: str) -> None:
    choice = chat_answer(tokenizer, tools=[WEATHER], tool_choice="required").choice(0, is_streamed=False)
    for reply in replies(text, "length"):
        choice.take(reply)
    assert (choice.text, choice.finish_reason) == ("", "length")


def test_without_parallel_calls_there_is_one(tokenizer: Tokenizer) -> None:
    for parallel, number in ((True, 2), (False, 1)):
        choice = chat_answer(tokenizer, tools=[WEATHER], parallel_tool_calls=parallel).choice(0, is_streamed=False)
        for reply in replies(f"{TEXT}\n{TEXT}", "stop"):
            choice.take(reply)
        assert len(choice.calls) == number
        assert len({call.id for call in choice.calls}) == number
