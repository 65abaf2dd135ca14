"""Errors of the model's side name the field of the request that they are about, as its API calls it."""

# ruff: noqa: E501 - the cases are tables
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.sampling.grammar import GrammarError, check_grammar
from tidewright.tokenization import Tokenizer
from tidewright_gateway.anthropic.protocol import MessagesRequest
from tidewright_gateway.anthropic.translation import as_sent, chat_of
from tidewright_gateway.config.api import ApiSettings
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.dialect import Dialect
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.wording import Wording

USER = {"role": "user", "content": "Hi"}
BAD = {"type": "object", "properties": {"a": {"$ref": "#/$defs/nowhere"}}}
NOWHERE = "failed to compile JSON schema: Pointer '/$defs/nowhere' does not exist"


def function(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.fixture(scope="module")
def dialect(model_dir: Path) -> Dialect:
    return Dialect(Tokenizer(model_dir), ApiSettings())


def wording(dialect: Dialect, request: ChatRequest) -> tuple[Wording, str]:
    """With the error of its grammar, as the bridge finds it; empty if it has none."""
    guided = dialect.guide(request.sampling(), request.tool_use)
    made = guided.guided_grammar if request.guided_grammar is None else None
    try:
        if guided.guided:
            check_grammar(guided)
    except GrammarError as error:
        return request.wording(request.tool_use, made), str(error)
    return request.wording(request.tool_use, made), ""


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [USER], **fields})


def told(made: Wording, message: str) -> ApiError:
    return made.told(ModelError(message, Outcome.INVALID))


AS_JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": BAD}}
TOOLS = [function("one", {"type": "object"}), function("two", BAD)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": TOOLS, "tool_choice": "required"}, f"tools.1.function.parameters: {NOWHERE}"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "two"}}}, f"tools.1.function.parameters: {NOWHERE}"),
        ({"tools": [*TOOLS[:1], function("big", {"properties": {"a": {"const": 2**60}}})], "tool_choice": "required"}, "tools.1.function.parameters: const: the integer 1152921504606846976 is too large; it may be from -2**53 to 2**53"),
        ({"tools": TOOLS[:1], "response_format": AS_JSON}, f"response_format: {NOWHERE}"),
        ({"tools": TOOLS[:1], "guided_json": BAD}, f"guided_json: {NOWHERE}"),
        ({"response_format": AS_JSON}, "response_format: Pointer '/$defs/nowhere' does not exist"),
        ({"structured_outputs": {"json": BAD}}, "structured_outputs: Pointer '/$defs/nowhere' does not exist"),
        ({"guided_json": BAD}, "guided_json: Pointer '/$defs/nowhere' does not exist"),
        ({"guided_choice": []}, "guided_choice: the list is empty; give at least one choice"),
    ],
)  # fmt: skip
def test_a_wrong_grammar_names_where_it_comes_from(dialect: Dialect, fields: dict[str, Any], message: str) -> None:
    made, error = wording(dialect, chat(**fields))
    found = told(made, error)
    assert (str(found), found.param) == (message, message.partition(":")[0])


@pytest.mark.parametrize("tool_format", ["hermes", "llama3_json", "mistral", "pythonic"])
def test_of_the_tools_it_is_the_right_one_in_each_format(dialect: Dialect, model_dir: Path, tool_format: Any) -> None:
    own = Dialect(Tokenizer(model_dir), ApiSettings(tool_format=tool_format))
    made, error = wording(own, chat(tools=[*TOOLS, function("three", {})], tool_choice="required"))
    assert told(made, error).param == "tools.1.function.parameters"


def test_in_anthropic_s_form_it_is_its_input_schema(dialect: Dialect) -> None:
    tools = [{"name": "one", "input_schema": {}}, {"name": "two", "input_schema": BAD}]
    body = {"model": "m", "messages": [USER], "max_tokens": 5, "tools": tools, "tool_choice": {"type": "any"}}
    made, error = wording(dialect, chat_of(MessagesRequest.model_validate(body)))
    found = as_sent(told(made, error))
    assert (str(found), found.param) == (f"tools.1.input_schema: {NOWHERE}", "tools.1.input_schema")


@pytest.mark.parametrize(
    ("fields", "message", "shown", "param"),
    [
        ({"tools": TOOLS, "tool_choice": "required"}, "ignore_eos with guided_grammar: drop one", "ignore_eos with tools: drop one", "ignore_eos"),
        ({"response_format": AS_JSON}, "min_tokens with guided_json: drop one", "min_tokens with response_format: drop one", "min_tokens"),
        ({"guided_regex": "a"}, "min_tokens with guided_regex: drop one", "min_tokens with guided_regex: drop one", "min_tokens"),
        ({}, "min_tokens is 50, more than max_tokens, 5", "min_tokens is 50, more than max_tokens, 5", "min_tokens"),
        ({}, "logprobs: 5", "top_logprobs: 5", "top_logprobs"),
        ({}, "the prompt is of another model", "the prompt is of another model", None),
        ({"guided_regex": "a"}, "guided output failed: too large", "guided_regex: guided output failed: too large", "guided_regex"),
        ({"tools": TOOLS, "tool_choice": "required"}, "guided output failed: too large", "tools: guided output failed: too large", "tools"),
        ({"response_format": AS_JSON}, "guided output failed: too large", "response_format: guided output failed: too large", "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "guided output failed: too large", "structured_outputs: guided output failed: too large", "structured_outputs"),
    ],
)  # fmt: skip
def test_others_are_in_the_request_s_words(
    dialect: Dialect, fields: dict[str, Any], message: str, shown: str, param: str | None
) -> None:
    request = chat(**fields)
    guided = dialect.guide(request.sampling(), request.tool_use)
    found = told(request.wording(request.tool_use, guided.guided_grammar), message)
    assert (str(found), found.param, found.status) == (shown, param, 400)


def test_a_schema_that_can_t_be_written_is_named(dialect: Dialect) -> None:
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"a": deep}
    request = chat(tool_choice="required")
    request = request.model_copy(update={"tools": chat(tools=TOOLS).tools})
    assert request.tools
    assert request.tools[1].function.parameters
    request.tools[1].function.parameters["properties"] = deep
    with pytest.raises(ApiError, match=r"^tools\.1\.function\.parameters: is no JSON schema"):
        dialect.guide(request.sampling(), request.tool_use)
