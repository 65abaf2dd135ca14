"""Output that is cut and resumed (`resume_ids`) is the undisturbed one, to the token and the byte."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from helpers.oracle import PROMPTS
from helpers.triton import Generation, RunningServer

SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_tokens": 32, "ignore_eos": True}
GREEDY = {"temperature": 0, "max_tokens": 32, "ignore_eos": True}
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.5}


@dataclass(frozen=True)
class Cut:
    """The responses to a stream, up to some."""

    token_ids: list[int]
    text: str


def cuts(whole: Generation, at: list[int]) -> list[Cut]:
    """Behind so many responses."""
    ids = [response["output_ids"].tolist() for response in whole.responses]
    return [
        Cut([token_id for some in ids[:number] for token_id in some], "".join(whole.chunks[:number])) for number in at
    ]


def assert_goes_on_everywhere(server: RunningServer, prompt: str, options: dict[str, Any]) -> Generation:
    """Cut a stream at several places and resume it, streaming and not; the undisturbed one."""
    inputs = {"text_input": prompt, "sampling_parameters": options, "return_finish_reason": True}
    whole = server.generate(stream=True, **inputs)
    assert whole.error is None
    last = len(whole.responses) - 1
    made = cuts(whole, sorted({1, 2, 5, last // 2, last - 3, last - 1, last} - {0}))
    assert len(made) >= 4
    with server.stream() as stream:
        for number, cut in enumerate(made):
            for streams in (True, False):
                stream.send(f"{number} {streams}", resume_ids=cut.token_ids, stream=streams, **inputs)
        generations = stream.finish()
    for name, got in generations.items():
        cut = made[int(name.split()[0])]
        assert got.error is None, name
        assert cut.token_ids + got.token_ids == whole.token_ids, name
        assert cut.text + got.text == whole.text, name
        assert got.outputs["finish_reason"].tolist() == whole.outputs["finish_reason"].tolist(), name
    return whole


@pytest.mark.parametrize("prompt", ["english", "emoji", "chinese"])
@pytest.mark.parametrize(
    "options", [GREEDY, SEEDED, GREEDY | PENALTIES, SEEDED | PENALTIES], ids=["greedy", "seeded", "greedy+", "seeded+"]
)
def test_it_goes_on_as_undisturbed(server: RunningServer, prompt: str, options: dict[str, Any]) -> None:
    whole = assert_goes_on_everywhere(server, PROMPTS[prompt], options)
    assert len(whole.token_ids) == 32


@pytest.mark.parametrize("options", [GREEDY, SEEDED | PENALTIES], ids=["greedy", "seeded+"])
def test_a_stop_string_ends_it_where_it_would_have(server: RunningServer, options: dict[str, Any]) -> None:
    prompt = PROMPTS["english"]
    free = server.generate(text_input=prompt, stream=True, sampling_parameters=options)
    # From the middle of one token to the middle of another, several tokens on: some cuts lie within it.
    start = len("".join(free.chunks[:12])) + 1
    stop = free.text[start : start + 14]
    assert free.text.index(stop) == start
    whole = assert_goes_on_everywhere(server, prompt, {**options, "stop": ["nowhere", stop]})
    assert whole.text == free.text[:start]
    assert whole.outputs["finish_reason"].tolist() == [b"stop"]
    assert "".join(whole.chunks) == whole.text  # nothing of it was let out


def test_min_tokens_and_stop_token_ids_count_what_is_resumed(server: RunningServer) -> None:
    prompt = PROMPTS["english"]
    free = server.generate(text_input=prompt, sampling_parameters=GREEDY).token_ids
    options = {**GREEDY, "stop_token_ids": sorted(set(free)), "min_tokens": 20}
    whole = assert_goes_on_everywhere(server, prompt, options)
    assert len(whole.token_ids) in range(20, 32)


def test_the_other_outputs_are_of_new_tokens(server: RunningServer) -> None:
    ids = server.generate(text_input="The sea is", sampling_parameters=GREEDY).token_ids
    inputs = {"text_input": "The sea is", "return_logprobs": True, "return_num_output_tokens": True}
    inputs |= {"return_num_input_tokens": True, "return_cumulative_logprob": True}
    options = {**GREEDY, "prompt_logprobs": 1, "logprobs": 0}
    whole = server.generate(sampling_parameters=options, **inputs)
    got = server.generate(sampling_parameters=options, resume_ids=ids[:20], **inputs)
    assert whole.text.startswith("The sea is")
    assert got.text == whole.text[-len(got.text) :]
    assert got.outputs["num_input_tokens"].tolist() == whole.outputs["num_input_tokens"].tolist()
    assert got.outputs["num_output_tokens"].tolist() == [12]
    logprobs = [
        [entry["logprob"] for entry in position.values()] for position in json.loads(got.outputs["logprobs"][0])
    ]
    expected = [
        [entry["logprob"] for entry in position.values()] for position in json.loads(whole.outputs["logprobs"][0])
    ]
    assert len(logprobs) == 12
    assert [value for (value,) in logprobs] == pytest.approx([value for (value,) in expected[20:]], abs=1e-4)
    assert got.outputs["cumulative_logprob"][0] == pytest.approx(sum(value for (value,) in logprobs), abs=1e-4)
    assert "prompt_logprobs" in whole.outputs
    assert "prompt_logprobs" not in got.outputs


def test_nothing_left_to_generate_is_refused(server: RunningServer) -> None:
    got = server.generate(text_input="The sea is", resume_ids=[5, 6], sampling_parameters={"max_tokens": 2})
    assert "nothing is left to generate [invalid]" in str(got.error)
