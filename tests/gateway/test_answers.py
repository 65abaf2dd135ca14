"""Answers of both formats, whole and in pieces: who answered, log-probabilities and where their tokens begin."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.answers import USER, chat_answer, completion_answer, context_of
from helpers.byte_fallback import byte_tokens, make_tokenizer, token
from tidewright.tokenization import Tokenizer
from tidewright_gateway.openai.answers import DONE, Choice
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.messages import InputMessage
from tidewright_gateway.openai.parsing import parse
from tidewright_gateway.replicas.triton import Reply


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("llama")
    make_tokenizer("llama").save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def data_of(event: bytes) -> Any:
    return json.loads(event.removeprefix(b"data: "))


def replies_of(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> list[Reply]:
    """A token each, with its text as the engine tells it; all of the answer's text comes with the last."""
    found = []
    for number, id in enumerate(ids):
        entry = {id: {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.token_text(id)}}
        is_last = number == len(ids) - 1
        logprobs = msgspec.json.encode([entry])
        found.append(Reply(text if is_last else "", [id], "stop" if is_last else None, logprobs))
    return found


def test_the_usage_says_who_answered(byte_fallback: Tokenizer) -> None:
    for models, whole in ((["decoder"], "decoder"), (["fallback"], "fallback"), (["decoder", "fallback"], "fallback")):
        made, choice = chat_answer(byte_fallback, stream=True, stream_options={"include_usage": True}), Choice(0)
        for model in models:
            reply = Reply(text="a", token_ids=[1], finish_reason=None, logprobs=None, served_by=model)
            assert data_of(made.piece(choice, choice.take(reply)))["served_by"] == model
        assert data_of(made.closing([choice]).removesuffix(DONE))["served_by"] == whole


SO_FAR = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize("endpoint", ["chat", "completion", "echo"])
def test_each_event_has_the_usage_so_far_and_the_first_the_prompt_s_ids(
    byte_fallback: Tokenizer, endpoint: str
) -> None:
    context = context_of([7, 8])
    asked = {**SO_FAR, "return_token_ids": True}
    if endpoint == "chat":
        made: Any = chat_answer(byte_fallback, context, **asked)
    else:
        context.echoes = ["Hi"] if endpoint == "echo" else []
        made = completion_answer(byte_fallback, context, echo=endpoint == "echo", **asked)
    choice, written = made.choice(0, is_streamed=True), b""
    for number, text in enumerate("ab"):
        reply = Reply(text, [9], "stop" if number else None, None)
        context.take(0, reply)
        part = choice.take(reply)
        written += (b"" if number else made.opening([choice])) + made.piece(choice, part)
    events = [data_of(event) for event in written.split(b"\n\n") if event]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == ([1, 2] if endpoint == "completion" else [0, 1, 2])
    assert all(event["usage"]["total_tokens"] == 2 + count for event, count in zip(events, counts, strict=True))
    ids = [event.get("prompt_token_ids") or event["choices"][0].get("prompt_token_ids") for event in events]
    assert ids == [[7, 8], *[None] * (len(events) - 1)]


def offsets_of(tokenizer: Tokenizer, prompt: list[int], text: str, ids: Sequence[int]) -> list[int]:
    """Whole; a stream's must be the same."""
    replies = replies_of(tokenizer, text, ids)
    whole, kept = completion_answer(tokenizer, context_of(prompt), logprobs=1), Choice(0, keeps_tokens=True)
    streamed, choice = completion_answer(tokenizer, context_of(prompt), logprobs=1), Choice(0)
    pieces = []
    for reply in replies:
        kept.take(reply)
        said = data_of(streamed.piece(choice, choice.take(reply)))["choices"][0]
        pieces += said["logprobs"]["text_offset"]
    found: list[int] = json.loads(whole.whole([kept]))["choices"][0]["logprobs"]["text_offset"]
    assert pieces == found
    return found


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab c é中😀\n"), min_size=1, max_size=12))
def test_a_token_of_whole_characters_stands_where_it_is_said_to(model_dir: Path, text: str) -> None:
    tokenizer = _known(model_dir)
    prompt = tokenizer.encode("p")
    ids = tokenizer.encode(text)
    offsets = offsets_of(tokenizer, prompt, text, ids)
    assert offsets == sorted(offsets)
    for id, at in zip(ids, offsets, strict=True):
        own = tokenizer.token_text(id)
        if "\ufffd" not in own:
            assert text[at : at + len(own)] == own
        assert at < len(text)


_known = functools.cache(Tokenizer)


def test_offsets_of_byte_tokens_are_those_of_their_characters(byte_fallback: Tokenizer) -> None:
    ids = [token("▁is"), *byte_tokens("中"), *byte_tokens("é"), token("▁is")]
    assert offsets_of(byte_fallback, [token("▁the")], " is中é is", ids) == [0, 3, 3, 3, 3, 3, 5]


def test_no_offset_is_beyond_a_text_that_a_stop_string_cut(byte_fallback: Tokenizer) -> None:
    ids = [token("▁is"), token("▁the"), token("▁is")]
    assert offsets_of(byte_fallback, [token("▁the")], " is t", ids) == [0, 3, 5]  # cut by "he is"


def test_tokens_of_the_same_text_keep_their_own_log_probability(byte_fallback: Tokenizer) -> None:
    entries = {
        "7": {"logprob": -3.0, "rank": 3, "decoded_token": "x"},
        "5": {"logprob": -1.0, "rank": 1, "decoded_token": "x"},
        "6": {"logprob": -2.0, "rank": 2, "decoded_token": "\ufffd"},
        "8": {"logprob": -4.0, "rank": 4, "decoded_token": "\ufffd"},
    }
    choice = Choice(0, keeps_tokens=True)
    choice.take(Reply("x", [7], "length", msgspec.json.encode([entries])))
    whole = json.loads(completion_answer(byte_fallback, logprobs=3).whole([choice]))
    top = whole["choices"][0]["logprobs"]["top_logprobs"]
    assert top == [{"x": -1.0, "\ufffd": -2.0, "token_id:7": -3.0, "token_id:8": -4.0}]


def test_a_stream_keeps_no_log_probabilities() -> None:
    choice = Choice(0)
    entry = {"5": {"logprob": -1.0, "rank": 1, "decoded_token": "x"}}
    assert choice.take(Reply("x", [5], None, msgspec.json.encode([entry] * 100))).positions
    assert choice.logprobs == []


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "a", "refusal": None, "audio": None, "function_call": None, "annotations": []},
        {"role": "assistant", "content": "a", "tool_calls": []},
        {"role": "assistant", "content": "a", "tool_calls": None},
    ],
)
def test_answers_may_come_back_as_history(message: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", "messages": [USER, message, USER]}).encode()
    assert parse(ChatRequest, body, 99).messages[1].text == (message.get("content") or "")


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ({"role": "assistant", "tool_calls": [{"id": "c"}]}, "invalid_value", "messages.0.tool_calls.0.function"),
        ({"role": "user", "content": None}, "invalid_value", "messages.0.content"),
        ({"role": "user"}, "invalid_value", "messages.0.content"),
        ({"role": "boss", "content": "a"}, "invalid_value", "messages.0.role"),
        ({"content": "a"}, "invalid_value", "messages.0.role"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "invalid_value", "messages.0.content.0.type"),
        ({"role": "user", "content": "a", "user": "b"}, "unknown_parameter", "messages.0.user"),
    ],
)
def test_what_a_message_can_t_be_is_said(message: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse(ChatRequest, json.dumps({"model": "m", "messages": [message]}).encode(), 99)
    assert (refused.value.code, refused.value.param) == (code, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"user": 5}, "user"),  # also the name of a role
        ({"logit_bias": {"Once": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stop": [5]}, "stop.0"),
        ({"str": 5}, "str"),
        ({"a[b": 5}, "a[b"),
    ],
)
def test_a_wrong_parameter_has_the_name_that_the_client_sent(fields: dict[str, Any], param: str) -> None:
    body = {"model": "m", "messages": [USER], **fields}
    with pytest.raises(ApiError, match=re.escape(param)) as refused:
        parse(ChatRequest, json.dumps(body).encode(), 99).sampling()
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is empty"),
        (b" \n", "the body is empty"),
        (b'{"model":', "ends too early"),
        (rb'{"model": "\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_a_body_that_is_no_json_is_told_why(body: bytes, said: str) -> None:
    with pytest.raises(ApiError, match=said) as refused:
        parse(ChatRequest, body, 99)
    assert refused.value.code == "invalid_json"


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert InputMessage.model_validate({"role": "user", "content": parts}).text == "ab"
