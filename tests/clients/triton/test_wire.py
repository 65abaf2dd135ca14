"""Tensors as tritonclient makes and the server names them, and what is refused before it is sent."""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import Any, get_type_hints

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from helpers.scripted_stream import texts
from tidewright.schema import DECODER_INPUTS, FAILSAFE_INPUTS, DecoderStatus, SamplingParams
from tidewright_client.errors import (
    Interrupted,
    InvalidRequest,
    NotFound,
    TidewrightError,
    TimedOut,
    Unavailable,
    UnexpectedAnswer,
)
from tidewright_client.triton import Logprob, Piece, Status, wire
from tidewright_client.triton.calls import embed_inputs, status_of, tokenizer_request
from tidewright_client.triton.faults import error_of
from tidewright_client.triton.order import Order, Sampling, checked_address, checked_metadata, order_of
from tidewright_client.triton.pieces import Collector

CHAT = [{"role": "user", "content": "Hi"}]


def order(
    prompt: Any = None, messages: Any = None, input_ids: Any = None, model: str = "failsafe", **more: Any
) -> Order:
    options = {name: more.pop(name, None) for name in ("request_id", "traceparent")}
    details, streams = more.pop("details", False), more.pop("streams", True)
    request_id, traceparent = options.values()
    return order_of(
        prompt, messages, input_ids, model, request_id, more, streams=streams, details=details, traceparent=traceparent
    )


def test_every_name_is_one_of_the_servers() -> None:
    made = {
        "failsafe": order(messages=CHAT, n=2, logprobs=1, details=True).inputs([1, 2], 3.0),
        "decoder": order("a", model="decoder", n=2, logprobs=1, details=True).inputs(None, 3.0)
        + embed_inputs("a", None)[1]
        + embed_inputs(None, [1])[1]
        + wire.control_input("health"),
    }
    for model, specs in (("failsafe", FAILSAFE_INPUTS), ("decoder", DECODER_INPUTS)):
        known = {spec.name: {"TYPE_STRING": "BYTES"}.get(spec.dtype, spec.dtype[5:]) for spec in specs}
        for name, datatype, _, _ in made[model]:
            assert known[name] == datatype
    assert set(get_type_hints(Sampling)) == set(SamplingParams.__struct_fields__) - {"timeout"}
    assert {field.name for field in dataclasses.fields(Status)} - {"fields"} <= set(DecoderStatus.__struct_fields__)


@pytest.mark.parametrize(
    ("inputs", "name", "datatype", "values"),
    [
        (wire.text_input("naïve 🍕\0"), "text_input", "BYTES", np.array(["naïve 🍕\0".encode()], dtype=np.object_)),
        (wire.text_input(""), "text_input", "BYTES", np.array([b""], dtype=np.object_)),
        (wire.ids_input([0, 5, 2**31 - 1]), "input_ids", "INT32", np.array([0, 5, 2**31 - 1], dtype=np.int32)),
        (wire.flag("stream"), "stream", "BOOL", np.array([True])),
    ],
)
def test_tensors_are_those_of_tritonclient(inputs: wire.Inputs, name: str, datatype: str, values: np.ndarray) -> None:
    theirs = grpcclient.InferInput(name, list(values.shape), datatype)
    theirs.set_data_from_numpy(values)
    assert inputs == [(name, datatype, theirs.shape(), theirs._get_content())]


def test_a_chat_goes_as_ids_and_beside_them_only_to_failsafe() -> None:
    def sent(model: str) -> dict[str, bytes]:
        return {name: raw for name, _, _, raw in order(messages=CHAT, model=model).inputs([4, 5], None)}

    assert {"messages", "text_input"} & set(sent("decoder")) == set()
    assert sent("decoder")["input_ids"] == struct.pack("<2i", 4, 5)
    assert json.loads(sent("failsafe")["messages"][4:]) == CHAT


def test_the_server_is_told_what_is_left_of_the_time() -> None:
    tensors = {name: raw for name, _, _, raw in order("a", temperature=0, seed=None).inputs(None, 8.5)}
    assert json.loads(tensors["sampling_parameters"][4:]) == {"temperature": 0, "timeout": 8.5}


def send(options: dict[str, Any]) -> None:
    """All that is made of them."""
    made = order(**options)
    if made.messages:
        tokenizer_request(None, made.messages)
    wire.request_of(made.model, made.request_id, made.inputs([1] if made.messages else None, None))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "give one of"),
        ({"prompt": "a", "input_ids": [1]}, "give one of"),
        ({"prompt": [1, 2]}, "token ids go into input_ids"),
        ({"messages": "Hi"}, "must be a list like"),
        ({"messages": ["Hi"]}, "must be a list like"),
        ({"messages": [{"role": "user", "content": object()}]}, "can't be written as JSON"),
        ({"messages": [{"role": "user", "content": float("nan")}]}, "can't be written as JSON"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"input_ids": []}, "is empty"),
        ({"input_ids": [1, 2**31]}, "2147483648, which is no token id"),
        ({"input_ids": [1, "a"]}, "'a', which is no token id"),
        ({"prompt": "a", "n": 17}, "n must be 1 to 16"),
        ({"prompt": "a", "n": "many"}, "n must be 1 to 16"),
        ({"prompt": "a", "stream": True}, "call stream"),
        ({"prompt": "a", "temperature": float("inf")}, "temperature is inf"),
        ({"prompt": "a", "guided_choice": {1, 2}}, "guided_choice must be a value that JSON has, not set"),
        ({"prompt": "a", "model": "generate"}, "ask failsafe"),
        ({"prompt": "a", "model": "generate_direct"}, "ask decoder"),
        ({"prompt": "a", "request_id": ""}, "1 to 256 characters"),
        ({"prompt": "a", "request_id": "a\x1f1"}, "1 to 256 characters"),
        ({"prompt": "a" * (wire.MAX_REQUEST_BYTES + 1)}, "more than the limit"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_can_not_be_right_is_not_sent(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        send(wrong)


@pytest.mark.parametrize("address", ["", "127.0.0.1", "http://127.0.0.1:8001", "127.0.0.1:8001/v2", "u@h:1", "h:x"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(InvalidRequest, match="HOST:PORT"):
        checked_address(address)
    assert checked_address("[::1]:8001") == "[::1]:8001"


def test_the_header_that_can_crash_triton_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="can crash Triton"):
        checked_metadata({"Triton_grpc_error": "true"})
    assert checked_metadata({"triton-grpc-protocol-key": "x"}) == (("triton-grpc-protocol-key", "x"),)


@pytest.mark.parametrize(
    ("message", "kind", "code"),
    [
        ("temperature is bad [invalid]", InvalidRequest, "invalid"),
        ("64 requests are in flight; try again later [overloaded]", Unavailable, "overloaded"),
        ("timed out [timeout]", TimedOut, "timeout"),
        ("the engine died\nagain [engine_failed]", Unavailable, "engine_failed"),
        ("cancelled by its id [cancelled]", Interrupted, "cancelled"),
        ("something [of_tomorrow]", Unavailable, None),
        ("Request for unknown model: 'failsafe' is not found", NotFound, None),
        ("[request id: 1] unexpected inference input 'stream' for model 'decoder'", InvalidRequest, None),
        ("expected number of inputs between 0 and 2 but got 5 inputs for model 'x'.", InvalidRequest, None),
        ("Stub process 'decoder_0_0' is not healthy.", Unavailable, None),
    ],
)
def test_errors_by_their_word(message: str, kind: type[TidewrightError], code: str | None) -> None:
    error = error_of(message, "7")
    assert (type(error), error.code, error.request_id) == (kind, code, "7")


def reply(model: str = "decoder", **outputs: bytes) -> wire.Reply:
    return wire.Reply("1", model, 0, outputs)


def test_outputs_of_several_sequences_are_told_apart() -> None:
    reader, collector = wire.Reader(), Collector("1", "decoder", 3)
    named = {"7": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}
    for text, ids, counts, reasons in (
        (("a", "", "x"), [1, 9], [1, 0, 1], ("None", "None", "None")),
        (("b", "y", ""), [2, 3, 5], [1, 2, 0], ("stop", "None", "length")),
        (("", "z", ""), [6], [0, 1, 0], ("stop", "length", "length")),
    ):
        pieces = reader.pieces(
            reply(
                text_output=texts(*text),
                output_ids=struct.pack(f"<{len(ids)}i", *ids),
                finish_reason=texts(*reasons),
                num_output_tokens=struct.pack("<3I", *counts),
                num_input_tokens=struct.pack("<I", 4),
                logprobs=texts(*(json.dumps([named] * count) for count in counts)),
                cumulative_logprob=struct.pack("<3f", -1, -2, -3),
            )
        )
        collector.add(pieces)
    answer = collector.answer()
    assert [(one.text, one.token_ids, one.finish_reason) for one in answer.outputs] == [
        ("ab", [1, 2], "stop"),
        ("yz", [3, 5, 6], "length"),
        ("x", [9], "length"),
    ]
    assert answer.outputs[1].logprobs == [{7: Logprob(-0.5, 1, "a")}] * 3
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 6)


def test_who_answers_is_said_once_and_stays_so() -> None:
    reader = wire.Reader()
    token = {"text_output": texts("a"), "output_ids": struct.pack("<i", 1), "finish_reason": texts("None")}
    first = reader.pieces(reply("failsafe", **token, served_by=texts("fallback"), fallback_reason=texts("stalled")))
    second = reader.pieces(reply("failsafe", **token))
    assert (first[0].served_by, first[0].fallback_reason) == ("fallback", "stalled")
    assert second == [Piece("a", [1], served_by="fallback")]
    assert wire.Reader().pieces(reply(**token))[0].served_by == "decoder"


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"text_output": texts("a")},
        {"text_output": b"\xff\0\0\0a", "output_ids": b"", "finish_reason": texts("stop")},
        {"text_output": texts("a"), "output_ids": b"abc", "finish_reason": texts("stop")},
        {"text_output": b"\1\0\0\0\xff", "output_ids": b"", "finish_reason": texts("stop")},
        {"text_output": texts("a", "b"), "output_ids": b"", "finish_reason": texts("stop")},
        {"text_output": texts("a"), "output_ids": b"", "finish_reason": texts("stop"), "logprobs": texts("{")},
        {"text_output": texts("a"), "output_ids": b"", "finish_reason": texts("stop"), "logprobs": texts("[1]")},
    ],
)
def test_what_is_no_generation_is_said_to_be_none(outputs: dict[str, bytes]) -> None:
    with pytest.raises(UnexpectedAnswer, match="can't be read"):
        wire.Reader().pieces(reply(**outputs))


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", '{"trouble": ""}'])
def test_what_is_no_status_is_said_to_be_none(text: str) -> None:
    with pytest.raises(UnexpectedAnswer, match="no status"):
        status_of(text)
