"""n > 1 through the real server: n outputs of one prompt, each as if it had been asked for alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from helpers.triton import Generation, RunningServer

PROMPT = "The lighthouse keeper climbed the stairs and"
OPTIONS = {"temperature": 0.9, "top_k": 50, "seed": 11, "max_tokens": 12}


def sequences(generation: Generation, n: int) -> tuple[list[str], list[list[int]], list[list[str]]]:
    """Text, token ids and finish reasons of each sequence, out of all responses."""
    texts, token_ids, reasons = [""] * n, [[] for _ in range(n)], [[] for _ in range(n)]
    for response in generation.responses:
        assert len(response["text_output"]) == len(response["num_output_tokens"]) == n
        own = np.split(response["output_ids"], np.cumsum(response["num_output_tokens"].astype(int))[:-1])
        for index in range(n):
            texts[index] += response["text_output"][index].decode()
            token_ids[index] += own[index].tolist()
            reasons[index].append(response["finish_reason"][index].decode())
        assert sum(map(len, own)) == len(response["output_ids"])
    return texts, token_ids, reasons


@pytest.fixture(scope="module")
def alone(server: RunningServer) -> list[Generation]:
    """What each sequence must be: a request of its own with the next seed."""
    made = [ask(server, **OPTIONS | {"seed": OPTIONS["seed"] + index}) for index in range(3)]
    assert len({tuple(generation.token_ids) for generation in made}) == 3
    return made


def ask(server: RunningServer, model: str = "decoder", stream: bool = False, **options: Any) -> Generation:
    return server.generate(
        model,
        text_input=PROMPT,
        stream=stream,
        exclude_input_in_output=True,
        return_finish_reason=True,
        return_cumulative_logprob=True,
        return_logprobs=True,
        sampling_parameters={"logprobs": 0, **options},
    )


@pytest.mark.parametrize("model", ["decoder", "generate"])
@pytest.mark.parametrize("stream", [False, True])
def test_each_sequence_is_what_its_seed_gives_alone(
    server: RunningServer, alone: list[Generation], model: str, stream: bool
) -> None:
    got = ask(server, model, stream, **OPTIONS, n=3)
    assert got.error is None
    assert got.ended == 1
    texts, token_ids, reasons = sequences(got, 3)
    assert texts == [generation.text for generation in alone]
    assert token_ids == [generation.token_ids for generation in alone]
    expected = [generation.outputs["finish_reason"][0].decode() for generation in alone]
    assert [own[-1] for own in reasons] == expected
    assert all(set(own) <= {"None", reason} for own, reason in zip(reasons, expected, strict=True))
    totals = [generation.outputs["cumulative_logprob"][0] for generation in alone]
    assert got.outputs["cumulative_logprob"] == pytest.approx(totals, abs=1e-3)
    positions = [[], [], []]
    for response in got.responses:
        for own, more in zip(positions, response["logprobs"], strict=True):
            own += json.loads(more)
    assert [[next(iter(entry)) for entry in own] for own in positions] == [[str(i) for i in own] for own in token_ids]
    assert (len(got.responses) > 3) == stream
    server.wait_idle()


def test_a_stop_string_ends_only_the_sequence_that_has_it(server: RunningServer, alone: list[Generation]) -> None:
    text, others = alone[1].text, (alone[0].text, alone[2].text)
    slices = (text[start : start + 4] for start in range(8, len(text) - 3))
    stop = next(part for part in slices if not any(part in other for other in others))
    texts, token_ids, reasons = sequences(ask(server, **OPTIONS, n=3, stop=[stop]), 3)
    assert texts == [alone[0].text, alone[1].text[: alone[1].text.index(stop)], alone[2].text]
    assert reasons[1] == ["stop"]
    assert (token_ids[0], token_ids[2]) == (alone[0].token_ids, alone[2].token_ids)
    server.wait_idle()


def test_over_http_too(server: RunningServer, alone: list[Generation]) -> None:
    body = {"text_input": PROMPT, "parameters": {**OPTIONS, "n": 3, "exclude_input_in_output": True}}
    answer = server.post("decoder/generate", body).json()
    assert answer["text_output"] == [generation.text for generation in alone]
    assert answer["num_output_tokens"] == [len(generation.token_ids) for generation in alone]


def test_a_cancel_ends_all_of_them(bf16_server: RunningServer) -> None:
    before = bf16_server.metrics()
    stream = bf16_server.stream()
    options = {"temperature": 0, "max_tokens": 2000, "ignore_eos": True, "n": 4}
    stream.send("1", text_input=PROMPT, stream=True, sampling_parameters=options)
    stream.next()
    stream.close(cancel=True)
    bf16_server.wait_idle()
    generated = bf16_server.metric("generated_tokens_total") - before["generated_tokens_total", ""]
    assert 0 < generated < 4 * 100
    cancelled = "requests_finished_total", "cancelled"
    assert bf16_server.metrics()[cancelled] == before[cancelled] + 1


def test_more_sequences_than_may_ever_run_are_refused(server: RunningServer) -> None:
    got = ask(server, **OPTIONS, n=1000)
    assert "<= 16 for `n`" in str(got.error)
