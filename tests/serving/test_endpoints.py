"""Every documented way in: gRPC stream and HTTP, decoder and generate, text, ids and chat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from helpers.triton import RunningServer

PROMPT = "The capital of France is"
OPTIONS = {"temperature": 0, "max_tokens": 8}


def events(text: str) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


@pytest.fixture(scope="module")
def expected(server: RunningServer) -> str:
    return server.generate(text_input=PROMPT, exclude_input_in_output=True, sampling_parameters=OPTIONS).text


@pytest.mark.parametrize("model", ["decoder", "failsafe", "generate", "generate_direct"])
def test_http_generate_includes_the_prompt_unless_told(server: RunningServer, model: str, expected: str) -> None:
    body = {"text_input": PROMPT, "parameters": {"stream": False, **OPTIONS}}
    answer = server.post(f"{model}/generate", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["text_output"] == PROMPT + expected
    body["parameters"]["exclude_input_in_output"] = True
    assert server.post(f"{model}/generate", body).json()["text_output"] == expected


@pytest.mark.parametrize("model", ["decoder", "failsafe", "generate", "generate_direct"])
def test_http_generate_stream(server: RunningServer, model: str, expected: str) -> None:
    body = {"text_input": PROMPT, "stream": True, "sampling_parameters": json.dumps(OPTIONS)}
    answer = server.post(f"{model}/generate_stream", body)
    pieces = events(answer.text)
    assert len(pieces) > 3
    assert "".join(piece["text_output"] for piece in pieces) == expected


@pytest.mark.parametrize("model", ["decoder", "failsafe", "generate", "generate_direct"])
@pytest.mark.parametrize("stream", [False, True])
def test_grpc_with_every_optional_output(server: RunningServer, model: str, stream: bool, expected: str) -> None:
    got = server.generate(
        model,
        text_input=PROMPT,
        stream=stream,
        exclude_input_in_output=True,
        sampling_parameters={**OPTIONS, "logprobs": 0},
        return_finish_reason=True,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
        return_logprobs=True,
        return_cumulative_logprob=True,
    )
    assert got.error is None
    assert got.ended == 1
    assert got.text == expected
    assert got.outputs["finish_reason"].tolist() == [b"length"]
    assert got.outputs["num_input_tokens"].tolist() == [5]
    assert got.outputs["num_output_tokens"].tolist() == [1 if stream else 8]
    assert len(json.loads(got.outputs["logprobs"][0])) == (1 if stream else 8)
    assert got.outputs["cumulative_logprob"][0] < 0


@pytest.mark.parametrize(
    ("model", "more"),
    [("decoder", set()), ("generate_direct", set()), ("failsafe", {"served_by"}), ("generate", {"served_by"})],
)
def test_unasked_outputs_stay_away(server: RunningServer, model: str, more: set[str]) -> None:
    got = server.generate(model, text_input=PROMPT, sampling_parameters=OPTIONS)
    assert set(got.outputs) == {"text_output", "output_ids"} | more


@pytest.mark.parametrize("model", ["failsafe", "generate"])
def test_the_first_and_the_last_response_tell_who_served_it(server: RunningServer, model: str) -> None:
    got = server.generate(model, text_input=PROMPT, stream=True, sampling_parameters=OPTIONS)
    named = ["served_by" in response for response in got.responses]
    assert len(named) > 3
    assert named == [True, *[False] * (len(named) - 2), True]
    assert got.outputs["served_by"].tolist() == [b"decoder"]


def test_sampling_parameters_as_request_parameters(server: RunningServer, expected: str) -> None:
    got = server.generate(
        parameters={"max_tokens": 8, "temperature": 0}, text_input=PROMPT, exclude_input_in_output=True
    )
    assert got.error is None
    assert got.text == expected


def test_strings_as_the_vllm_backends_sample_client_sends_them(server: RunningServer, expected: str) -> None:
    options = {"temperature": "0", "max_tokens": "8"}
    got = server.generate(text_input=PROMPT, exclude_input_in_output=True, sampling_parameters=options)
    assert got.text == expected


def test_chat_uses_the_models_template(server: RunningServer, model_dir: Path) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    ids = AutoTokenizer.from_pretrained(model_dir).apply_chat_template(messages, add_generation_prompt=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    chat = server.generate(
        "generate", messages=json.dumps(messages), exclude_input_in_output=True, sampling_parameters=OPTIONS
    )
    assert chat.error is None
    direct = server.generate(input_ids=ids, exclude_input_in_output=True, sampling_parameters=OPTIONS)
    assert chat.token_ids == direct.token_ids


def test_tokenizer_alone(server: RunningServer, model_dir: Path) -> None:
    reference = AutoTokenizer.from_pretrained(model_dir)
    for text in (PROMPT, "1234 and 日本語 👍🏽"):
        body = {"inputs": [{"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]}
        answer = server.post("tokenizer/infer", body)
        assert answer.json()["outputs"][0]["data"] == reference(text)["input_ids"]
