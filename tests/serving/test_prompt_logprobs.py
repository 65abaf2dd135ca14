"""Log-probabilities of the prompt through the real server, against transformers'."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.oracle import PROMPTS, Oracle
from helpers.triton import RunningServer


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


def test_a_prompt_of_one_token_has_none(server: RunningServer) -> None:
    got = server.generate(input_ids=[1000], sampling_parameters={"max_tokens": 1, "prompt_logprobs": 0})
    assert json.loads(got.outputs["prompt_logprobs"][0]) == [None]


def test_unasked_it_stays_away(server: RunningServer) -> None:
    got = server.generate(input_ids=[1000, 1001], sampling_parameters={"max_tokens": 1})
    assert "prompt_logprobs" not in got.outputs
