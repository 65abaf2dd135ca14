"""Log-probabilities of the prompt through the real server, against transformers'."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from helpers.oracle import PROMPTS, Oracle
from helpers.triton import Generation, RunningServer


@pytest.mark.parametrize("model", ["decoder", "generate"])
@pytest.mark.parametrize(("stream", "n"), [(False, 1), (True, 1), (False, 2)])
def test_prompt_logprobs_are_those_of_transformers(
    server: RunningServer, oracle: Oracle, model: str, stream: bool, n: int
) -> None:
    ids = oracle.ids(PROMPTS["english"])
    got = server.generate(
        model,
        text_input=PROMPTS["english"],
        stream=stream,
        sampling_parameters={"temperature": 0, "max_tokens": 4, "prompt_logprobs": 2, "n": n},
    )
    assert got.error is None
    carrying = [response for response in got.responses if "prompt_logprobs" in response]
    assert carrying == [response for response in got.responses if len(response["output_ids"])][:1]
    first, *positions = json.loads(carrying[0]["prompt_logprobs"][0])
    assert first is None
    with torch.inference_mode():
        expected = oracle._model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for row, token_id, entries in zip(expected[:-1], ids[1:], positions, strict=True):
        assert set(map(int, entries)) == set(row.topk(2).indices.tolist()) | {token_id}
        for key, entry in entries.items():
            assert entry["logprob"] == pytest.approx(row[int(key)].item(), abs=1e-3)
            assert entry["rank"] == int((row > row[int(key)]).sum()) + 1
            assert entry["decoded_token"] == oracle.tokenizer.decode([int(key)])


@dataclass(frozen=True)
class Told:
    """What a request was told of its prompt and of one output."""

    prompt: list[dict[str, Any]]
    token_ids: list[int]
    output: list[dict[str, Any]]


def told(generation: Generation, index: int = 0) -> Told:
    """Of the sequence with that index; what comes of the prompt comes once."""
    (of_prompt,) = [response["prompt_logprobs"] for response in generation.responses if "prompt_logprobs" in response]
    token_ids: list[int] = []
    output: list[dict[str, Any]] = []
    for response in generation.responses:
        ends = response["num_output_tokens"].cumsum().tolist()
        token_ids += response["output_ids"].tolist()[ends[index - 1] if index else 0 : ends[index]]
        output += json.loads(response["logprobs"][index])
    first, *positions = json.loads(of_prompt[0])
    assert first is None
    assert len(output) == len(token_ids)
    return Told(positions, token_ids, output)


def furthest(oracle: Oracle, ids: list[int], start: int, positions: list[dict[str, Any]]) -> float:
    """The largest difference from transformers. `positions`: log-probabilities of the tokens from number `start` on."""
    worst = 0.0
    with torch.inference_mode():
        logits_TV = oracle._model(torch.tensor([ids])).logits[0, start - 1 :]
    for logits_V, token_id, entries in zip(logits_TV, ids[start:], positions, strict=False):
        expected_V = logits_V.log_softmax(-1)
        assert next(iter(entries)) == str(token_id)
        for key, entry in entries.items():
            worst = max(worst, abs(entry["logprob"] - expected_V[int(key)].item()))
    return worst


def test_they_are_right_with_all_else_that_a_request_may_have(server: RunningServer, oracle: Oracle) -> None:
    """Beside logprobs, streamed or not, of many outputs, of a cached prompt, and in chunks beside another stream."""
    names = ("english", "code", "chinese", "emoji", "long")
    inputs: dict[str, Any] = {
        "return_logprobs": True,
        "return_num_output_tokens": True,
        "return_num_cached_tokens": True,
    }
    sampling = {"seed": 3, "max_tokens": 6, "ignore_eos": True, "logprobs": 2, "prompt_logprobs": 1}
    shapes = [(False, 1), (True, 1), (False, 3), (True, 2)]
    with server.stream() as stream:
        for name in names:  # now their blocks are cached
            stream.send(name, text_input=PROMPTS[name], sampling_parameters={"max_tokens": 1})
        stream.finish()
    with server.stream() as stream:
        options = {"max_tokens": 1000, "ignore_eos": True, "timeout": 60}
        stream.send("beside", text_input="Once", stream=True, sampling_parameters=options)
        beside = stream.generations["beside"]
        while not beside.token_ids:
            stream.next()
        for name in names:
            for streams, n in shapes if name != "long" else shapes[1:2]:
                own = {"text_input": PROMPTS[name], "stream": streams, "sampling_parameters": {**sampling, "n": n}}
                stream.send(f"{name} {streams} {n}", **own, **inputs)
        long, before = stream.generations["long True 1"], len(beside.token_ids)
        while not long.responses:
            stream.next()
        assert len(beside.token_ids) > before + 2  # they share the steps
        while not all(generation.ended for name, generation in stream.generations.items() if name != "beside"):
            stream.next()
        server.control("cancel:beside")
        generations = stream.finish()
    del generations["beside"]
    worst = 0.0
    for label, generation in generations.items():
        assert generation.error is None, label
        assert generation.outputs["num_cached_tokens"].tolist() == [0]  # all hidden states are needed
        name, _, n = label.split()
        prompt_ids = oracle.ids(PROMPTS[name])
        for index in range(int(n)):
            found = told(generation, index)
            assert len(found.token_ids) == 6
            assert len(found.prompt) == len(prompt_ids) - 1
            ids = prompt_ids + found.token_ids
            worst = max(worst, furthest(oracle, ids, 1, found.prompt + found.output))
    assert worst < 1e-3, worst


def test_the_log_likelihood_of_a_continuation(server: RunningServer, oracle: Oracle) -> None:
    """As lm-eval asks for it: the prompt is context and continuation; its sum counts, and whether it is greedy."""
    for context, continuation in (("The capital of France is", " Paris"), ("2 + 2 =", " 5, said the duck")):
        context_ids, ids = oracle.ids(context), oracle.ids(context + continuation)
        options = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 1}
        got = server.generate(input_ids=ids, sampling_parameters=options)
        positions = json.loads(got.outputs["prompt_logprobs"][0])[len(context_ids) :]
        entries = [
            position[str(token_id)] for position, token_id in zip(positions, ids[len(context_ids) :], strict=True)
        ]
        with torch.inference_mode():
            logprobs_TV = oracle._model(torch.tensor([ids])).logits[0, len(context_ids) - 1 : -1].log_softmax(-1)
        rest = torch.tensor(ids[len(context_ids) :])
        expected = logprobs_TV.gather(-1, rest[:, None]).sum().item()
        assert sum(entry["logprob"] for entry in entries) == pytest.approx(expected, abs=1e-3)
        assert all(entry["rank"] == 1 for entry in entries) == bool((logprobs_TV.argmax(-1) == rest).all())


def test_a_prompt_of_one_token_has_none(server: RunningServer) -> None:
    got = server.generate(input_ids=[1000], sampling_parameters={"max_tokens": 1, "prompt_logprobs": 0})
    assert json.loads(got.outputs["prompt_logprobs"][0]) == [None]


def test_unasked_it_stays_away(server: RunningServer) -> None:
    got = server.generate(input_ids=[1000, 1001], sampling_parameters={"max_tokens": 1})
    assert "prompt_logprobs" not in got.outputs
