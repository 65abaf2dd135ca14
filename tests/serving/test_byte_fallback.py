"""Text of models whose tokenizer falls back to bytes (Llama 2, Mistral, Gemma), of random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from rich.console import Console

from helpers.byte_fallback import BOS, INVALID, byte, save_byte_fallback, text_behind, token
from helpers.families import GEMMA2, WINDOW
from helpers.triton import Generation, RunningServer
from serving.test_failsafe import load, served
from tidewright.bridge.text_stream import TextStream
from tidewright.launch.export import export
from tidewright.schema import SamplingParams
from tidewright.tokenization import Tokenizer

PARIS = {"logit_bias": {str(token("▁Paris")): 100}, "temperature": 0, "max_tokens": 3}
# Of every byte, and of some that make whole characters with each other and stand beside letters.
BYTES = {str(byte(value)): 100 for value in range(256)}
MIXED = {str(byte(value)): 100 for value in range(128, 256)} | {
    str(token(letter)): 100 for letter in "abcdefghijklmnop"
}
TEXT = "中文 é 😀 中\n"


def serve(folder: Path, **options: Any) -> RunningServer:
    return RunningServer(folder, dtype="float32", streaming_share=1, kv_cache_memory="16MiB", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("byte-fallback")


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With another tokenizer."""
    folder = tmp_path_factory.mktemp("fallback")
    save_byte_fallback(folder, hf.LlamaConfig, "gemma")
    export(folder, folder / "float32", ("float32",), Console(quiet=True))
    return folder / "float32"


@pytest.fixture(scope="module")
def server(folder: Path, fallback: Path) -> Iterator[RunningServer]:
    save_byte_fallback(folder, hf.LlamaConfig, "llama")
    with serve(folder, fallback=str(fallback)) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(server: RunningServer, folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def ways(server: RunningServer, prompt: str, **sampling: Any) -> Generation:
    """The request whole and streamed, which must have the same tokens and text."""
    inputs = {"text_input": prompt, "sampling_parameters": sampling, "return_finish_reason": True}
    whole = server.generate(exclude_input_in_output=True, **inputs)
    streamed = server.generate(stream=True, **inputs)
    assert (whole.error, streamed.error) == (None, None)
    assert (whole.text, whole.token_ids) == (streamed.text, streamed.token_ids)
    assert whole.outputs["finish_reason"].tolist() == streamed.outputs["finish_reason"].tolist()
    return whole


def assert_bytes_are_harmless(server: RunningServer, tokenizer: Tokenizer, biases: list[dict[str, float]]) -> None:
    """What a model writes at random, many at once: all are answered, with the text of their tokens."""
    prompt = tokenizer.encode("a is")
    with server.stream() as stream:
        for number in range(12):
            sampling = {"seed": number, "max_tokens": 120, "ignore_eos": True}
            sampling |= {"logit_bias": biases[number % len(biases)]}
            for streams in (True, False):
                stream.send(f"{number} {streams}", input_ids=prompt, stream=streams, sampling_parameters=sampling)
        generations = stream.finish()
    for name, got in generations.items():
        assert got.error is None, name
        assert len(got.token_ids) == 120, name
        echo = "" if name.endswith("True") else "a is"
        assert got.text == echo + text_behind(tokenizer, prompt, got.token_ids), name


def test_bytes_that_are_no_text_are_replaced(server: RunningServer, tokenizer: Tokenizer) -> None:
    assert_bytes_are_harmless(server, tokenizer, [BYTES, MIXED])


@pytest.mark.parametrize(
    ("config", "kind", "options"),
    [(hf.MistralConfig, "llama", {"sliding_window": WINDOW}), (hf.Gemma2Config, "gemma", {**GEMMA2, "head_dim": 12})],
    ids=["mistral", "gemma 2"],
)
def test_other_families_write_what_they_like(
    tmp_path: Path, config: type[hf.PreTrainedConfig], kind: str, options: dict[str, Any]
) -> None:
    save_byte_fallback(tmp_path, config, kind, **options)
    with serve(tmp_path) as server:
        assert_bytes_are_harmless(server, Tokenizer(tmp_path), [{}])
        assert ways(server, "a is", **PARIS).text == " Paris Paris Paris"


def test_the_first_token_keeps_its_leading_space(server: RunningServer) -> None:
    assert ways(server, "a is", **PARIS).text == " Paris Paris Paris"
    for model in ("decoder", "failsafe", "generate"):
        assert server.generate(model, text_input="a is", sampling_parameters=PARIS).text == "a is Paris Paris Paris"
    of_both = server.generate(text_input="a is", exclude_input_in_output=True, sampling_parameters={**PARIS, "n": 2})
    assert of_both.outputs["text_output"].tolist() == [b" Paris Paris Paris"] * 2


@pytest.mark.parametrize("text", [" Paris is the", "Paris is", TEXT, "the\n\n中 true"])
def test_guided_text_comes_out_as_the_grammar_has_it(server: RunningServer, text: str) -> None:
    assert ways(server, "a is", guided_choice=[text], max_tokens=60).text == text


def test_wherever_it_is_cut_and_resumed_the_text_is_the_same(server: RunningServer, tokenizer: Tokenizer) -> None:
    sampling = {"guided_choice": [f" Paris {TEXT}the"], "max_tokens": 60, "temperature": 0}
    inputs = {"text_input": "a is", "stream": True, "sampling_parameters": sampling}
    prompt, whole = tokenizer.encode("a is"), server.generate(**inputs)
    assert whole.text == text_behind(tokenizer, prompt, whole.token_ids) == f" Paris {TEXT}the"
    sent, texts = TextStream(tokenizer, prompt, SamplingParams()), [""]
    with server.stream() as stream:
        for count, token_id in enumerate(whole.token_ids[:-1], 1):
            texts.append(texts[-1] + sent.push(token_id))
            stream.send(str(count), resume_ids=whole.token_ids[:count], **inputs)
        generations = stream.finish()
    for name, got in generations.items():
        assert got.error is None
        assert texts[int(name)] + got.text == whole.text, name


def test_a_text_cut_within_a_character_ends_in_one_replacement(server: RunningServer) -> None:
    text = "字" * 20 + "文" + TEXT
    length = len(ways(server, "a", guided_choice=[text], max_tokens=120, temperature=0).token_ids)
    assert length > 60
    for most in [*range(1, 8), *range(60, length)]:
        got = ways(server, "a", guided_choice=[text], max_tokens=most, temperature=0).text
        assert text.startswith(got.removesuffix(INVALID)), most
        assert got.count(INVALID) <= 1, most


def test_texts_of_log_probabilities_join_to_the_text(server: RunningServer) -> None:
    sampling = {"guided_choice": ["the is true Paris é"], "logprobs": 3, "prompt_logprobs": 1, "max_tokens": 40}
    got = server.generate(text_input="a is", stream=True, return_logprobs=True, sampling_parameters=sampling)
    chosen = []
    for response in got.responses:
        for position in json.loads(response["logprobs"][0]):
            assert len(position) >= 3
            chosen.append(next(iter(position.values()))["decoded_token"])
    assert "".join(chosen).removesuffix("</s>") == got.text == "the is true Paris é"
    of_prompt = json.loads(next(r["prompt_logprobs"][0] for r in got.responses if "prompt_logprobs" in r))
    texts = [position[next(iter(position))]["decoded_token"] for position in of_prompt[1:]]
    assert "".join(texts).endswith(" is")


def test_a_stop_string_of_byte_tokens_ends_it_with_its_last_byte(server: RunningServer) -> None:
    guided = {"guided_choice": [f"the{TEXT}Paris"], "max_tokens": 60, "temperature": 0}
    got = ways(server, "a", **guided, stop=["\n"])
    assert got.text == "the" + TEXT[:-1]
    assert got.token_ids[-1] == byte(ord("\n"))
    assert got.outputs["finish_reason"].tolist() == [b"stop"]
    got = ways(server, "a", **guided, stop=["x", "😀 "])
    assert got.text == "the中文 é "


def test_stops_wait_for_min_tokens(server: RunningServer) -> None:
    line = {"logit_bias": {str(byte(ord("\n"))): 100}, "temperature": 0, "max_tokens": 9, "stop": ["\n"]}
    assert ways(server, "a", **line, min_tokens=4).text == "\n\n\n"
    assert ways(server, "a", **line).text == ""


def test_a_prompt_gets_the_tokenizers_special_tokens_once(server: RunningServer) -> None:
    """And one that its text begins with: docs/api.md says so."""
    chat = json.dumps([{"role": "user", "content": "a"}])
    for inputs, count in [({"text_input": "a"}, 1), ({"text_input": "<s>a"}, 2), ({"messages": chat}, 1)]:
        ids = server.post("tokenizer/generate", inputs).json()["input_ids"]
        assert ids.count(BOS) == count, inputs
        asked = {"return_num_input_tokens": True, "max_tokens": 1, **inputs}
        assert server.post("generate/generate", asked).json()["num_input_tokens"] == len(ids)


def test_the_fallback_with_another_tokenizer_writes_as_its_own_has_it(server: RunningServer, fallback: Path) -> None:
    """The last test here: it unloads the decoder."""
    load(server, "decoder", "unload")
    own = Tokenizer(fallback)
    for prompt in ("a is", "中 😀 is"):
        got = server.generate(
            "failsafe", text_input=prompt, stream=True, sampling_parameters={"max_tokens": 60, "seed": 4}
        )
        assert got.error is None
        assert served(got) == [("fallback", "unavailable")]
        assert got.text == text_behind(own, own.encode(prompt), got.token_ids)
        assert got.token_ids
