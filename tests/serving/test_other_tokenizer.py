"""A decoder with token ids of its own, and the embedded model as its fallback: answers from text, not from ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.checkpoints import VOCAB, save
from helpers.exports import save_tokenizer
from helpers.families import FAMILIES
from helpers.oracle import PROMPTS, Oracle
from helpers.triton import RunningServer
from serving.test_failsafe import load, served
from tidewright.cache import MANIFEST

GREEDY = {"temperature": 0, "max_tokens": 16}
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(float32_fallback: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("small")
    save(folder, FAMILIES["llama, tied"])
    save_tokenizer(folder)
    template = {"chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(template))
    (folder / MANIFEST).write_text("{}")
    # The decoder is asked in vain several times here, and the breaker must not hide its answer.
    options = {"dtype": "float32", "fallback": str(float32_fallback), "breaker_consecutive_failures": 100}
    with RunningServer(folder, **options) as running:
        yield running


@pytest.mark.parametrize("inputs", [{"text_input": "Once"}, {"input_ids": [5, 6, 7]}])
def test_the_decoder_answers_with_its_own(server: RunningServer, inputs: dict) -> None:
    got = server.generate("failsafe", **inputs, sampling_parameters={**GREEDY, "ignore_eos": True})
    assert served(got) == [("decoder", "")]
    assert len(got.token_ids) == 16
    assert max(got.token_ids) < VOCAB


def test_failsafe_takes_messages_only_beside_their_ids(server: RunningServer) -> None:
    got = server.generate("failsafe", messages=json.dumps(CHAT), sampling_parameters=GREEDY)
    assert "send them to generate" in str(got.error)
    assert str(got.error).endswith("[invalid]")
    chat = {"messages": json.dumps(CHAT), "input_ids": [5, 6, 7], "return_num_input_tokens": True}
    assert server.generate("failsafe", **chat, sampling_parameters=GREEDY).outputs["num_input_tokens"] == [3]


@pytest.fixture(scope="module")
def without_decoder(server: RunningServer) -> None:
    """For the rest of this module: to load it each time again would take seconds."""
    load(server, "decoder", "unload")


@pytest.mark.parametrize("model", ["failsafe", "generate"])
@pytest.mark.parametrize("name", ["english", "emoji"])
def test_the_fallback_answers_from_the_text(
    server: RunningServer, without_decoder: None, oracle: Oracle, model: str, name: str
) -> None:
    got = server.generate(model, text_input=PROMPTS[name], stream=True, sampling_parameters=GREEDY)
    assert got.error is None
    assert served(got) == [("fallback", "unavailable")]
    assert got.token_ids == oracle.greedy(oracle.ids(PROMPTS[name]), 16, guess=got.token_ids)


def test_the_fallback_answers_a_chat_with_its_own_template(
    server: RunningServer, without_decoder: None, oracle: Oracle
) -> None:
    got = server.generate("generate", messages=json.dumps(CHAT), sampling_parameters=GREEDY)
    assert got.error is None
    ids = oracle.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert got.token_ids == oracle.greedy(ids, 16, guess=got.token_ids)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [({"input_ids": [5, 6, 7]}, {}), ({"text_input": "Once"}, {"stop_token_ids": [5]})],
)
def test_what_only_the_decoder_understands_waits_for_it(
    server: RunningServer, without_decoder: None, prompt: dict, options: dict
) -> None:
    got = server.generate("failsafe", **prompt, sampling_parameters={**GREEDY, **options})
    assert "decoder" in str(got.error)
    assert str(got.error).endswith("[engine_failed]")
    assert got.ended == 1
