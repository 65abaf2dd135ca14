"""What a model thinks before its answer is told apart from it, however the text is split."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.answers import chat_answer, context_of
from tidewright.chat_template import ChatTemplate
from tidewright.tokenization import Tokenizer
from tidewright_gateway.openai.output import Event, PlainParser, Reasoning, ReasoningParser, Text, joined
from tidewright_gateway.openai.tools.json_formats import Hermes


def read(pieces: list[str], has_begun: bool = False) -> list[Event]:
    parser = ReasoningParser("<think>", "</think>", PlainParser(), has_begun=has_begun)
    return joined([event for piece in pieces for event in parser.push(piece)] + parser.finish())


READ = [
    ("<think>\nHm.\n</think>\n\nYes.\n", "Hm.", "Yes.\n"),
    (" \n<think>a</think>b", "a", "b"),
    ("<think>a < b </thin k></think>", "a < b </thin k>", ""),
    ("<think>\n\n</think>\n\nYes", "", "Yes"),
    ("<think>cut \n", "cut", ""),
    ("<think>cut </thi", "cut </thi", ""),
    ("<thinking>no</thinking>", "", "<thinking>no</thinking>"),
    ("No. <think>x</think>", "", "No. <think>x</think>"),
    ("  text", "", "  text"),
    ("<thi", "", "<thi"),
    ("", "", ""),
]


def parts(events: list[Event]) -> tuple[str, str]:
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    return reasoning, "".join(event.text for event in events if isinstance(event, Text))


@pytest.mark.parametrize(("text", "reasoning", "answer"), READ)
def test_reasoning_stands_between_its_markers(text: str, reasoning: str, answer: str) -> None:
    assert parts(read([text])) == (reasoning, answer)
    assert read(list(text)) == read([text])


def test_reasoning_may_have_begun_in_the_prompt() -> None:
    assert parts(read(["Hm.", "\n</think>\nYes"], has_begun=True)) == ("Hm.", "Yes")
    assert parts(read(["Hm."], has_begun=True)) == ("Hm.", "")


some_text = st.text(st.sampled_from("<>/thinkTHINK \na"), max_size=40)


@given(before=st.sampled_from(["", "<think>", "\n<think>\n"]), text=some_text, has_begun=st.booleans(), data=st.data())
def test_how_the_text_is_split_makes_no_difference(
    before: str, text: str, has_begun: bool, data: st.DataObject
) -> None:
    whole = before + text + data.draw(st.sampled_from(["", "</think>", "</think>\n"])) + data.draw(some_text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=10)))
    pieces = [whole[at:to] for at, to in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert read(pieces, has_begun) == read([whole], has_begun)


def test_calls_come_behind_reasoning() -> None:
    parser = ReasoningParser("<think>", "</think>", Hermes().scanner(None), has_begun=False)  # type: ignore[arg-type]
    events = parser.push('<think>a {"name"</think>\n<tool_call>{"name":"f","arguments":{}}</tool_call>')
    assert [type(event).__name__ for event in joined(events)] == ["Reasoning", "CallBegin", "CallArguments"]


@pytest.mark.parametrize(
    ("template", "setting", "is_guided", "prompt_end", "kind"),
    [
        ("{{ '</think>' }}", "auto", False, "", ReasoningParser),
        ("{{ '</think>' }}", "none", False, "", None),
        ("{{ '</think>' }}", "auto", True, "<think>\n", None),
        ("plain", "auto", False, "", None),
        ("plain", "think", False, "", ReasoningParser),
    ],
)
def test_the_chat_template_says_whether_a_model_thinks(
    model_dir: Any, template: str, setting: Any, is_guided: bool, prompt_end: str, kind: type | None
) -> None:
    tokenizer = Tokenizer(model_dir)
    tokenizer.chat_template = ChatTemplate(template, {})
    context = context_of()
    context.is_guided, context.prompt_end = is_guided, prompt_end
    choice = chat_answer(tokenizer, context, api={"reasoning": setting}).choice(0, is_streamed=True)
    assert type(choice.parser) is (kind or type(None))
