"""What clients of Triton's vLLM backend send, unchanged."""

from __future__ import annotations

import json

import pytest

from helpers.triton import RunningServer

PROMPT = "The capital of France is"
OPTIONS = {"temperature": "0", "max_tokens": "4"}


@pytest.mark.parametrize("model", ["decoder", "failsafe", "generate"])
def test_parameters_in_the_tensor_and_as_request_parameters(server: RunningServer, model: str) -> None:
    """As its client.py does; the tensor wins, and request parameters are not even read."""
    for parameters in (OPTIONS, {"max_tokens": 9, "nonsense": 1}, {"temperature": float("nan")}):
        got = server.generate(model, parameters, text_input=PROMPT, sampling_parameters=OPTIONS)
        assert got.error is None
        assert len(got.token_ids) == 4


def test_without_the_tensor_request_parameters_count(server: RunningServer) -> None:
    got = server.generate("decoder", {"max_tokens": 3, "temperature": 0.0}, text_input=PROMPT)
    assert len(got.token_ids) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_null_if_none_were_asked_for(server: RunningServer, stream: bool) -> None:
    options = {**OPTIONS, "n": 2, "seed": 1}
    got = server.generate(text_input=PROMPT, stream=stream, return_logprobs=True, sampling_parameters=options)
    assert got.error is None
    for response in got.responses:
        assert [json.loads(element) for element in response["logprobs"]] == [None, None]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"choice": ["Rome"]}, "Rome"),
        ({"regex": "[0]{3}"}, "000"),
        ({"json": {"enum": ["Paris"]}}, '"Paris"'),
        ({"grammar": 'start: "Lyon"'}, "Lyon"),
    ],
)
def test_structured_outputs(server: RunningServer, given: dict, expected: str) -> None:
    options = {"structured_outputs": given, "temperature": 0}
    for model in ("decoder", "failsafe"):
        got = server.generate(model, text_input=PROMPT, exclude_input_in_output=True, sampling_parameters=options)
        assert (got.error, got.text) == (None, expected)


def test_seeds_of_64_bits(server: RunningServer) -> None:
    def ask(seed: int) -> list[int]:
        options = {"seed": seed, "max_tokens": 24, "ignore_eos": True}
        got = server.generate(text_input=PROMPT, sampling_parameters=options)
        assert got.error is None
        return got.token_ids

    assert ask(-(2**63)) == ask(-(2**63))
    assert ask(-5) == ask(-5) != ask(-6)
    assert ask(-1) != ask(-1)
