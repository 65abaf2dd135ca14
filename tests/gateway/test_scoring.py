"""Log-probabilities of prompts through the API, as programs that score texts ask for them: those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.gateway import MODEL, RunningGateway
from helpers.oracle import PROMPTS, Oracle
from helpers.triton import RunningServer

CLOSE = 1e-3


@pytest.fixture(scope="module")
def gateway(model_dir: Path, server: RunningServer) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, server) as running:
        yield running


def complete(gateway: RunningGateway, **fields: Any) -> dict[str, Any]:
    answer = gateway.post("/v1/completions", {"model": MODEL, "max_tokens": 1, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


TEXTS = ["english", "emoji", "code", "special tokens", "one token", "newlines", "mixed"]


@pytest.mark.parametrize("name", TEXTS)
def test_an_echo_has_the_log_probabilities_of_transformers(gateway: RunningGateway, oracle: Oracle, name: str) -> None:
    text = PROMPTS[name]
    ids = oracle.ids(text)
    for prompt in (text, ids):
        (choice,) = complete(gateway, prompt=prompt, echo=True, logprobs=1)["choices"]
        found = choice["logprobs"]
        expected = oracle.logprobs(ids + oracle.greedy(ids, 1))
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:] == pytest.approx(expected, abs=CLOSE)
        for top, own in zip(found["top_logprobs"][1:], found["token_logprobs"][1:], strict=True):
            assert own in top.values()
            assert max(top.values()) >= own
        for token, at in zip(found["tokens"], found["text_offset"], strict=True):
            if "\ufffd" not in token:
                assert choice["text"][at : at + len(token)] == token or at + len(token) > len(choice["text"])


def test_the_same_without_an_answer_and_streamed(gateway: RunningGateway) -> None:
    options = {"model": MODEL, "prompt": PROMPTS["emoji"], "echo": True, "logprobs": 2, "temperature": 0}
    whole = complete(gateway, **options, max_tokens=3)["choices"][0]
    scored = complete(gateway, **options, max_tokens=0)
    only = scored["choices"][0]
    assert only["text"] == PROMPTS["emoji"]
    assert only["finish_reason"] == "length"
    assert scored["usage"]["completion_tokens"] == 0
    for name, values in only["logprobs"].items():
        assert values == whole["logprobs"][name][:-3]
    text, columns = "", {name: [] for name in whole["logprobs"]}
    for piece in gateway.openai.completions.create(**options, max_tokens=3, stream=True):  # type: ignore[call-overload]
        text += piece.choices[0].text
        for name in columns:
            columns[name] += piece.choices[0].logprobs.model_dump()[name]
    assert (text, columns) == (whole["text"], whole["logprobs"])


def test_each_prompt_and_choice_has_its_own(gateway: RunningGateway) -> None:
    together = complete(gateway, prompt=["The sea", "A cat sat"], n=2, echo=True, logprobs=0, max_tokens=0)["choices"]
    alone = [
        complete(gateway, prompt=prompt, echo=True, logprobs=0, max_tokens=0)["choices"][0]
        for prompt in ("The sea", "A cat sat")
    ]
    assert [choice["logprobs"] for choice in together] == [alone[at]["logprobs"] for at in (0, 0, 1, 1)]


def test_prompt_logprobs_and_ids_are_there_where_asked_for(gateway: RunningGateway, oracle: Oracle) -> None:
    ids = oracle.ids(PROMPTS["english"])
    choice = complete(gateway, prompt=ids, prompt_logprobs=0, return_token_ids=True)["choices"][0]
    assert choice["prompt_token_ids"] == ids
    assert choice["token_ids"] == oracle.greedy(ids, 1)
    assert choice["prompt_logprobs"][0] is None
    told = [
        position[str(token_id)]["logprob"]
        for position, token_id in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)
    ]
    assert told == pytest.approx(oracle.logprobs(ids), abs=CLOSE)
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "prompt_logprobs": 0}
    body = gateway.post("/v1/chat/completions", {**chat, "return_token_ids": True}).json()
    assert len(body["prompt_logprobs"]) == len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]
    refused = gateway.post("/v1/chat/completions", {**chat, "stream": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_a_prompt_can_be_cut_to_its_end(gateway: RunningGateway, oracle: Oracle) -> None:
    ids = oracle.ids(PROMPTS["english"])
    cut = complete(gateway, prompt=PROMPTS["english"], truncate_prompt_tokens=3, echo=True, return_token_ids=True)
    assert cut["choices"][0]["prompt_token_ids"] == ids[-3:]
    assert cut["choices"][0]["text"].startswith(oracle.tokenizer.decode(ids[-3:]))
    for wrong in (0, -2, 100_000):
        refused = gateway.post("/v1/completions", {"model": MODEL, "prompt": "a", "truncate_prompt_tokens": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "truncate_prompt_tokens")


def test_why_it_stopped_and_what_was_cached(gateway: RunningGateway) -> None:
    prompt = "Once upon a time there was a lighthouse keeper who counted ships. " * 4
    assert complete(gateway, prompt=prompt)["choices"][0]["stop_reason"] is None
    again = complete(gateway, prompt=prompt, max_tokens=40, stop=["e"])
    assert again["choices"][0]["stop_reason"] == "e"
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16
    kept = complete(gateway, prompt=prompt, max_tokens=40, stop=["e"], include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == again["choices"][0]["text"] + "e"
    (token_id,) = gateway.post("/tokenize", {"prompt": " the"}).json()["tokens"]
    only = complete(gateway, prompt=prompt, max_tokens=3, allowed_token_ids=[token_id])
    assert only["choices"][0]["text"] == " the the the"
    ended = complete(gateway, prompt=prompt, allowed_token_ids=[token_id], stop_token_ids=[token_id])
    assert ended["choices"][0]["stop_reason"] == token_id


def test_the_bytes_of_chat_tokens_are_the_text(gateway: RunningGateway) -> None:
    chat = gateway.openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        logprobs=True,
        top_logprobs=2,
        extra_body={"guided_choice": ["é😀 中"]},
    ).choices[0]
    assert bytes(byte for entry in chat.logprobs.content for byte in entry.bytes).decode() == chat.message.content
    assert any("\ufffd" in entry.token for entry in chat.logprobs.content)
