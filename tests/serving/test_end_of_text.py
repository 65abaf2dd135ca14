"""What ends a text, and special tokens within it, through the real server: streamed, whole, of many, and resumed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.triton import Generation, RunningServer

START, EOS = 1, 2  # <|im_start|>, <|im_end|>
GREEDY = {"temperature": 0, "max_tokens": 16}
YES = {**GREEDY, "guided_choice": ["yes it is"]}
MODELS = ("decoder", "failsafe", "generate")


def ways(server: RunningServer, sampling: dict[str, Any], prompt: str = "Is water wet?") -> Generation:
    """Streamed, whole, two at once, through each model, and resumed at each token; the streamed one."""
    inputs = {"text_input": prompt, "return_finish_reason": True, "exclude_input_in_output": True}
    inputs["return_stop_reason"] = True
    streamed = server.generate(stream=True, sampling_parameters=sampling, **inputs)
    assert streamed.error is None
    assert ["stop_reason" in response for response in streamed.responses] == [False] * (len(streamed.responses) - 1) + [
        True
    ]
    with server.stream() as stream:
        for model in MODELS:
            stream.send(model, model, sampling_parameters=sampling, **inputs)
            stream.send(f"{model} of two", model, sampling_parameters={**sampling, "n": 2}, **inputs)
        for count in range(1, len(streamed.responses)):
            ids = [token_id for response in streamed.responses[:count] for token_id in response["output_ids"].tolist()]
            stream.send(f"behind {count}", resume_ids=ids, sampling_parameters=sampling, **inputs)
        generations = stream.finish()
    for name, got in generations.items():
        assert got.error is None, name
        texts = [text.decode() for text in got.outputs["text_output"].tolist()]
        if name.startswith("behind"):
            before = "".join(streamed.chunks[: int(name.split()[1])])
            assert before + texts[0] == streamed.text, name
        else:
            assert texts == [streamed.text] * (2 if "two" in name else 1), name
        reasons = got.outputs["stop_reason"].tolist()
        assert reasons == streamed.outputs["stop_reason"].tolist() * len(texts), name
        assert set(got.outputs["finish_reason"].tolist()) == set(streamed.outputs["finish_reason"].tolist()), name
    return streamed


def stop_reason(generation: Generation) -> Any:
    (reason,) = generation.outputs["stop_reason"]
    return json.loads(reason)


def test_unasked_there_is_no_stop_reason(server: RunningServer) -> None:
    assert "stop_reason" not in server.generate(text_input="a", sampling_parameters=GREEDY).outputs


def test_each_of_many_sequences_has_its_own_stop_reason(server: RunningServer) -> None:
    """All come at the end of the last one."""
    options = {"temperature": 1.0, "seed": 5, "n": 6, "max_tokens": 40, "guided_regex": "[a-z]{1,20}", "stop": "e"}
    got = server.generate(
        text_input="A word:",
        stream=True,
        sampling_parameters=options,
        return_finish_reason=True,
        return_stop_reason=True,
    )
    assert sum("stop_reason" in response for response in got.responses) == 1
    reasons = [json.loads(reason) for reason in got.outputs["stop_reason"]]
    assert set(reasons) == {"e", None}


def test_a_stop_string_is_kept_where_asked_for(server: RunningServer) -> None:
    free = server.generate(
        text_input="Is water wet?", exclude_input_in_output=True, sampling_parameters={**GREEDY, "ignore_eos": True}
    ).text
    stop = free[9:20]
    end = free.index(stop)
    for keeps in (False, True):
        options = {**GREEDY, "ignore_eos": True, "stop": ["nowhere", stop], "include_stop_str_in_output": keeps}
        got = ways(server, options)
        assert got.text == free[: end + len(stop) * keeps]
        assert got.outputs["finish_reason"].tolist() == [b"stop"]
        assert stop_reason(got) == stop


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("skip", [True, False])
def test_the_text_of_eos(server: RunningServer, keeps: bool, skip: bool) -> None:
    got = ways(server, {**YES, "include_stop_str_in_output": keeps, "skip_special_tokens": skip})
    assert got.token_ids[-1] == EOS
    assert stop_reason(got) is None
    assert got.text == ("yes it is<|im_end|>" if keeps and not skip else "yes it is")


@pytest.mark.parametrize("keeps", [False, True])
def test_the_text_of_a_stop_token(server: RunningServer, keeps: bool) -> None:
    last = server.generate(text_input="Is water wet?", sampling_parameters=YES).token_ids[-2]
    options = {**YES, "stop_token_ids": [last], "include_stop_str_in_output": keeps}
    got = ways(server, options)
    assert got.token_ids[-1] == stop_reason(got) == last
    assert got.text == ("yes it is" if keeps else "yes it")


@pytest.mark.parametrize("skip", [True, False])
def test_a_special_token_within_the_text(server: RunningServer, skip: bool) -> None:
    options = {**GREEDY, "logit_bias": {START: 100}, "ignore_eos": True, "max_tokens": 3, "skip_special_tokens": skip}
    got = ways(server, options)
    assert got.token_ids == [START] * 3
    assert stop_reason(got) is None
    assert got.text == ("" if skip else "<|im_start|>" * 3)
