"""Bad input gets a clear error, others are unharmed, and afterwards the same server answers as before."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator

import pytest
import tritonclient.grpc as grpcclient

from helpers import upstream
from helpers.triton import RunningServer, tensor

PROMPT = "The capital of France is"
OPTIONS = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(autouse=True)
def _server_unharmed(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[None]:
    """Before and after each test the server gives the same answer, and then its pool is whole."""
    before = server.generate(text_input=PROMPT, sampling_parameters=OPTIONS)
    assert before.error is None
    yield
    after = server.generate(text_input=PROMPT, sampling_parameters=OPTIONS)
    may_crash = request.function is test_grpc_status_and_reason
    # Its client may see the crash as an answer without tokens.
    if after.token_ids != before.token_ids and may_crash and upstream.crashed(server):
        server.revive()
        after = server.generate(text_input=PROMPT, sampling_parameters=OPTIONS)
    assert after.token_ids == before.token_ids
    server.wait_idle()


BAD = {
    "over-length prompt": ({"text_input": "word " * 5000}, "at most 4095"),
    "empty prompt": ({"text_input": ""}, "empty"),
    "empty ids": ({"input_ids": []}, "empty"),
    "invalid UTF-8": ({"text_input": b"caf\xe9"}, "not valid UTF-8"),
    "not JSON": ({"text_input": "x", "sampling_parameters": "{max_tokens: 3"}, "not JSON"),
    "unknown parameter": ({"text_input": "x", "sampling_parameters": {"maxtokens": 3}}, "maxtokens"),
    "temperature": ({"text_input": "x", "sampling_parameters": {"temperature": -1}}, "temperature"),
    "top_p": ({"text_input": "x", "sampling_parameters": {"top_p": 1.5}}, "top_p"),
    "max_tokens": ({"text_input": "x", "sampling_parameters": {"max_tokens": 0}}, "max_tokens"),
    "token id": ({"input_ids": [1, 99999]}, "from 0 to 49151"),
    "negative token id": ({"input_ids": [-5]}, "from 0 to 49151"),
    "both inputs": ({"text_input": "x", "input_ids": [1]}, "not both"),
    "neither input": ({"stream": True}, "either text_input or input_ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_grpc_error_is_clear_and_comes_once(server: RunningServer, name: str) -> None:
    inputs, message = BAD[name]
    got = server.generate(**inputs)
    assert got.error is not None
    assert message in str(got.error)
    assert str(got.error).endswith(" [invalid]")
    assert got.ended == 1
    assert not got.chunks


def test_through_the_ensemble_too(server: RunningServer) -> None:
    for inputs, message in (
        ({"text_input": ""}, "empty"),
        ({"messages": "[{"}, "JSON"),
        ({"messages": '[{"role": "user"}]'}, "content"),
        ({"text_input": "x", "sampling_parameters": {"nope": 1}}, "nope"),
    ):
        got = server.generate("generate", **inputs)
        assert got.error is not None
        assert message in str(got.error)
        assert str(got.error).endswith(" [invalid]")


def status_of_error(server: RunningServer, model: str, options: dict) -> grpcclient.InferenceServerException:
    came: queue.Queue = queue.Queue()
    client = grpcclient.InferenceServerClient(server.grpc_url)
    # Without that header, errors come as messages, and the stream goes on.
    client.start_stream(lambda result, error: came.put(error), headers={"triton_grpc_error": "true"})
    inputs = [tensor("text_input", "x"), tensor("sampling_parameters", json.dumps(options))]
    client.async_stream_infer(model, inputs)
    error = came.get(timeout=60)
    client.stop_stream()
    client.close()
    return error


@pytest.mark.parametrize("model", ["decoder", "failsafe", "generate", "generate_direct"])
@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        ({"temperature": -1}, "StatusCode.INVALID_ARGUMENT", "invalid"),
        ({"max_tokens": 5000}, "StatusCode.INVALID_ARGUMENT", "invalid"),  # which only the decoder knows
        ({"timeout": 0}, "StatusCode.UNAVAILABLE", "timeout"),
    ],
)
def test_grpc_status_and_reason(server: RunningServer, model: str, options: dict, status: str, reason: str) -> None:
    error = status_of_error(server, model, options)
    while error.status() != status and upstream.crashed(server):  # by chance, mostly where the cores are busy
        server.revive()
        error = status_of_error(server, model, options)
    assert error.status() == status
    assert error.message().endswith(f" [{reason}]")
    assert error.message().count("[") == 1


def test_http_error_body(server: RunningServer) -> None:
    answer = server.post("decoder/generate", {"text_input": "x", "temprature": 1})
    assert answer.status_code == 400
    assert "temprature" in answer.json()["error"]
    assert answer.json()["error"].endswith(" [invalid]")


def test_others_are_unharmed_by_bad_requests_in_their_batch(server: RunningServer) -> None:
    with server.stream() as stream:
        for number in range(8):
            stream.send(f"good {number}", text_input=PROMPT, stream=True, sampling_parameters=OPTIONS)
        good = stream.finish()
        with server.stream() as bad:
            for name, (inputs, _) in BAD.items():
                bad.send(name, **inputs)
            assert all(generation.error for generation in bad.finish().values())
    assert len({tuple(generation.token_ids) for generation in good.values()}) == 1


def test_a_thousand_at_once_are_answered_or_refused(server: RunningServer) -> None:
    """The limit of the fixture's server is 64 + 200 requests."""
    options = json.dumps({"temperature": 0, "max_tokens": 2})
    with server.stream() as stream:
        for number in range(1000):
            stream.send(str(number), text_input="The", sampling_parameters=options)
        generations = stream.finish()
    refused = [g for g in generations.values() if g.error]
    assert all("requests are running or waiting" in str(g.error) for g in refused)
    assert all(str(g.error).endswith(" [overloaded]") for g in refused)
    answered = {tuple(g.token_ids) for g in generations.values() if not g.error}
    assert len(answered) == 1
    assert 0 < len(refused) <= 1000 - 264
    assert all(g.ended == 1 for g in generations.values())
