"""Calls of tools in the text of a model: read the same however the text is split, and forced by a grammar."""

# ruff: noqa: E501 - the cases are a table
from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jsonschema_rs
import llguidance
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewright.chat_template import ChatTemplate
from tidewright.sampling.grammar import check_grammar, make_matcher
from tidewright.schema import SamplingParams
from tidewright_gateway.openai.output import CallArguments, CallBegin, Event, OutputParser, Text, joined
from tidewright_gateway.openai.tools.base import closed
from tidewright_gateway.openai.tools.definitions import Function, ToolUse
from tidewright_gateway.openai.tools.formats import FORMATS, format_of

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "$defs": {"city": {"enum": ["Köln", "Paris"]}},
}
WEATHER = Function(name="get_weather", parameters=CITY)
CLOCK = Function(name="clock.now")
USE = ToolUse((WEATHER, CLOCK), (0, 1))

Call = tuple[str, dict[str, Any]]


def read(parser: OutputParser, pieces: list[str]) -> list[Event]:
    return joined([event for piece in pieces for event in parser.push(piece)] + parser.finish())


def calls_of(events: list[Event]) -> list[Call]:
    names = [event.name for event in events if isinstance(event, CallBegin)]
    texts = [""] * len(names)
    for event in events:
        if isinstance(event, CallArguments):
            texts[event.index] += event.text
    return [(name, json.loads(text)) for name, text in zip(names, texts, strict=True)]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    return [text[at:to] for at, to in pairwise(sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)}))]


F, G, NOW = ("f", {}), ("g", {}), ("clock.now", {})
READ: dict[str, list[tuple[str, list[Call], str]]] = {
    "hermes": [
        ('Hi <tool_call>\n{"name": "f", "arguments": {"a": "}\\"<"}}\n</tool_call>', [("f", {"a": '}"<'})], "Hi"),
        ('<tool_call>{"name":"f","arguments":null}</tool_call>\n\n', [F], ""),
        ('<tool_call>{"name":"f"}</tool_call>', [F], ""),
        ('<tool_call>{"name":"f","arguments":"{\\"a\\":1}"}</tool_call>', [("f", {"a": 1})], ""),
        ('<tool_call>{"arguments":{"a":[1,{"b":"]"}]},"id":7,"name":"f"}</tool_call> end', [("f", {"a": [1, {"b": "]"}]})], " end"),
        ('<tool_call>{"name":"f","parameters":{}}</tool_call>\n<tool_call>{"name":"g","arguments":{"é":"😀"}}</tool_call>', [F, ("g", {"é": "😀"})], ""),
        ('<tool_call>{"name":"f"} and text', [F], " and text"),
        ('<tool_call>{"name":"f"}\n<tool_call>{"name":"g"}\n</tool_cal', [F, G], ""),
        ('<tool_call>{"name":"f"}</tool_call>\n<tool_call>\n{"name', [F], ""),
        ('<tool_call>{"name":"f"}</tool_call>\n<tool_', [F], ""),
        ("<<tool_call> no </tool_call>", [], "<<tool_call> no </tool_call>"),
        ('<tool_call>{"name": 5}</tool_call>', [], '<tool_call>{"name": 5}</tool_call>'),
        ("half a <tool_cal", [], "half a <tool_cal"),
        (" \n text \n", [], " \n text \n"),
    ],
    "mistral": [
        ('[TOOL_CALLS][{"name":"f","arguments":{"a":1}}, {"name":"g","arguments":{}}]', [("f", {"a": 1}), G], ""),
        ('text [TOOL_CALLS] [{"name":"f","arguments":{}}]', [F], "text"),
        ('[TOOL_CALLS]f{"a": 1}', [("f", {"a": 1})], ""),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]x1[ARGS]{}', [("f", {"a": 1}), G], ""),
        ("[TOOL_CALLS] nothing", [], "[TOOL_CALLS] nothing"),
        ("[1, 2]", [], "[1, 2]"),
    ],
    "llama3_json": [
        ('{"name": "clock.now", "parameters": {}}', [NOW], ""),
        ('<|python_tag|>{"name": "clock.now", "parameters": {}}; {"name": "x"}', [NOW], '; {"name": "x"}'),
        ('{"name": "clock.now", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "x"}}', [NOW, ("get_weather", {"city": "x"})], ""),
        ('{"name": "Bob", "parameters": {}}', [], '{"name": "Bob", "parameters": {}}'),
        ('{"answer": 42}', [], '{"answer": 42}'),
        ("Hello; {", [], "Hello; {"),
    ],
    "pythonic": [
        ("[clock.now()]", [NOW], ""),
        ("[get_weather(city='a, b)', more=[1, {'x': None}], yes=True), clock.now()]", [("get_weather", {"city": "a, b)", "more": [1, {"x": None}], "yes": True}), NOW], ""),
        ('[get_weather(**{"city": "\\u00e9\\ud83d\\ude00", "yes": true})]', [("get_weather", {"city": "é😀", "yes": True})], ""),
        ('[get_weather(city="it\\\'s", days=-2.5, t=(1, 2))]', [("get_weather", {"city": "it's", "days": -2.5, "t": [1, 2]})], ""),
        ("[other(a=1)]", [], "[other(a=1)]"),
        ("[1, 2, 3]", [], "[1, 2, 3]"),
        ("plain (text)", [], "plain (text)"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pythonic", "[get_weather(city=b'x')]"),
        ("pythonic", "[get_weather(city=2j)]"),
        ("pythonic", "[get_weather(city=...)]"),
        ("pythonic", "[get_weather(city='\\ud800')]"),
        ("pythonic", "[get_weather(city={'\\ud800': 1})]"),
        ("hermes", '<tool_call>{"name":"\\ud800"}</tool_call>'),
        ("hermes", '<tool_call>{"name":"f","arguments":"{\\"a\\":\\"\\ud800\\"}"}</tool_call>'),
        ("llama3_json", '{"name": "\\ud800", "parameters": {}}'),
    ],
)
def test_what_has_no_json_is_no_call_and_breaks_nothing(name: str, text: str) -> None:
    events = read(FORMATS[name]().scanner(USE), [text])
    for event in events:
        assert msgspec.json.encode(vars(event))
    assert "ud800" not in "".join(event.text for event in events if isinstance(event, CallArguments))


@pytest.mark.parametrize(
    ("name", "text", "calls", "rest"), [(name, *case) for name, cases in READ.items() for case in cases]
)
@given(data=st.data())
def test_calls_are_read_however_the_text_is_split(
    name: str, text: str, calls: list[Call], rest: str, data: st.DataObject
) -> None:
    whole = read(FORMATS[name]().scanner(USE), [text])
    assert (calls_of(whole), text_of(whole)) == (calls, rest)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=30))
    assert read(FORMATS[name]().scanner(USE), pieces_of(text, cuts)) == whole


@pytest.mark.parametrize("name", FORMATS)
@given(text=st.text(st.sampled_from('{}[]()<>|"\\,:;= \nab1_ée'), max_size=60), cuts=st.lists(st.integers(0, 60)))
def test_any_text_is_read_and_none_of_it_is_lost_where_there_is_no_call(name: str, text: str, cuts: list[int]) -> None:
    for before in ("", *FORMATS[name].markers, FORMATS[name].opening):
        whole = read(FORMATS[name]().scanner(USE), [before + text])
        assert read(FORMATS[name]().scanner(USE), pieces_of(before + text, cuts)) == whole
        if not any(isinstance(event, CallBegin) for event in whole):
            assert text_of(whole) == before + text


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
some_arguments = st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), json_values, max_size=3)


@pytest.mark.parametrize("name", FORMATS)
@given(calls=st.lists(st.tuples(st.sampled_from(["get_weather", "clock.now"]), some_arguments), min_size=1, max_size=3))
def test_what_a_format_writes_it_reads(name: str, calls: list[Call]) -> None:
    text = FORMATS[name]().text([{"name": called, "arguments": given} for called, given in calls])
    assert calls_of(read(FORMATS[name]().scanner(USE), [text])) == calls


@pytest.fixture(scope="module")
def tokenizer(model_dir: Any) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(str(model_dir / "tokenizer.json"), 49152, [2])


@pytest.fixture
def allows(tokenizer: llguidance.LLTokenizer) -> Callable[[str, str], bool]:
    """Whether a grammar takes a text, and it may end there."""

    def ask(grammar: str, text: str) -> bool:
        matcher = make_matcher(SamplingParams(guided_grammar=grammar), tokenizer)
        ids = tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return ask


@pytest.mark.parametrize("name", FORMATS)
def test_a_forced_call_is_one_of_the_tools_with_arguments_of_its_schema(
    name: str, allows: Callable[[str, str], bool]
) -> None:
    made = FORMATS[name]()
    one, several = (
        made.grammar(ToolUse((WEATHER, CLOCK), (0, 1), True, is_parallel), None) for is_parallel in (False, True)
    )

    def written(*calls: Call) -> str:
        if name == "pythonic":  # forced arguments are one object of JSON
            return "[" + ", ".join(f"{called}(**{json.dumps(given)})" for called, given in calls) + "]"
        return made.text([{"name": called, "arguments": given} for called, given in calls])

    good, other = ("get_weather", {"city": "Paris", "days": 2}), ("clock.now", {})
    assert allows(one, written(good))
    assert allows(one, written(other))
    assert not allows(one, written(good, other))
    assert allows(several, written(good, other))
    for grammar in (one, several):
        assert not allows(grammar, "")
        assert not allows(grammar, "Hello")
        assert not allows(grammar, written(("get_weather", {"city": "Rome"})))
        assert not allows(grammar, written(("get_weather", {"city": "Paris", "days": 10})))
        assert not allows(grammar, written(("get_weather", {"city": "Paris", "more": 1})))
        assert not allows(grammar, written(("clock.now", {"zone": 1})))
        assert not allows(grammar, written(("other", {})))
    assert calls_of(read(made.scanner(USE), [written(good, other)])) == [good, other]


@pytest.mark.parametrize("name", FORMATS)
def test_a_strict_call_follows_its_schema_but_is_not_forced(name: str, allows: Callable[[str, str], bool]) -> None:
    made = FORMATS[name]()
    grammar = made.grammar(USE, None)
    call = made.text([{"name": "clock.now", "arguments": {}}]) if name != "pythonic" else "[clock.now(**{})]"
    assert allows(grammar, "Hello, {world}")
    assert allows(grammar, "")
    assert allows(grammar, call)
    assert not allows(grammar, call.replace("clock.now", "clock.later"))
    if made.opening:
        assert allows(grammar, f"It is {call}")


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_in_json_may_be_a_call_instead(name: str, allows: Callable[[str, str], bool]) -> None:
    made = FORMATS[name]()
    grammar = made.grammar(USE, '{"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}')
    call = made.text([{"name": "clock.now", "arguments": {}}]) if name != "pythonic" else "[clock.now(**{})]"
    assert allows(grammar, '{"x": 5}')
    assert allows(grammar, call)
    assert not allows(grammar, "Hello")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("opening_id", [None, 7])
def test_the_engine_takes_every_grammar(name: str, opening_id: int | None) -> None:
    for is_forced, is_parallel, answer in ((f, p, a) for f in (0, 1) for p in (0, 1) for a in (None, "{}")):
        grammar = FORMATS[name](opening_id).grammar(
            ToolUse((WEATHER, CLOCK), (0, 1), bool(is_forced), bool(is_parallel)), answer
        )
        check_grammar(SamplingParams(guided_grammar=grammar))
        if opening_id is not None and FORMATS[name].opening:
            assert "<[7]>" in grammar


def test_arguments_that_a_schema_does_not_name_are_left_out_unless_it_allows_them() -> None:
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert closed(inner)["additionalProperties"] is False
    assert closed({"type": "object", "properties": {"b": inner}})["properties"]["b"]["additionalProperties"] is False
    assert closed({"type": "array", "items": inner})["items"]["additionalProperties"] is False
    optional = closed({"anyOf": [inner, {"type": "null"}]})
    assert [part.get("additionalProperties") for part in optional["anyOf"]] == [False, None]
    for open_schema in (
        {**inner, "additionalProperties": True},
        {**inner, "anyOf": [{"required": ["a"]}]},
        {"allOf": [inner]},
        {"type": "object", "patternProperties": {"^x": {}}},
        {"type": "object", "minProperties": 1},
    ):
        assert closed(open_schema) == open_schema
    for schema in (inner, CITY):
        jsonschema_rs.validator_for(closed(schema))


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ messages }}", "hermes"),
        ("<tool_call>\n{{ tools }}", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("[func_name1(params_name1=params_value1, ...)]", "pythonic"),
    ],
)
def test_the_format_is_that_of_the_chat_template(template: str, name: str) -> None:
    assert format_of(ChatTemplate(template, {})).name == name
    assert format_of(None).name == "hermes"
