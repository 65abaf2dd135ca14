"""Gateway and replicas of two versions: recorded messages of the version before, in both directions, and later ones."""

from __future__ import annotations

import base64
import itertools
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from helpers.gateway import RunningGateway
from helpers.scripted_replicas import WELL, ScriptedClient, generate, named, run, until
from helpers.triton import RunningServer
from tidewright.bench.machine import free_ports
from tidewright.schema import DECODER_INPUTS, OLDEST_PROTOCOL, PROTOCOL, DecoderStatus, SamplingParams
from tidewright_gateway.replicas.failover import Failover
from tidewright_gateway.replicas.health import read_status

Recording = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def recorded() -> Recording:
    """What a gateway of protocol 1 asked a real replica of protocol 1, and its answers: serialized messages."""
    file = Path(__file__).with_name("protocol_1.json")
    cases = msgspec.json.decode(file.read_bytes(), type=dict[str, dict[str, Any]])
    return {
        name: {
            "request": service_pb2.ModelInferRequest.FromString(base64.b64decode(case["request"])),
            "responses": [
                service_pb2.ModelStreamInferResponse.FromString(base64.b64decode(text)) for text in case["responses"]
            ],
        }
        for name, case in cases.items()
    }


class RecordedReplica(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with what was recorded, and refuses what a replica of that time did not know, as Triton does."""

    def __init__(self, recorded: Recording) -> None:
        self._recorded = recorded
        self._known = {spec.name for spec in inputs_of(recorded)}
        (port,) = free_ports(1)
        self.grpc_url = f"127.0.0.1:{port}"
        self._server = grpc.server(ThreadPoolExecutor(8))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.grpc_url)

    def __enter__(self) -> RecordedReplica:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()

    def ModelStreamInfer(  # noqa: N802 - gRPC's name
        self, requests: Iterator[service_pb2.ModelInferRequest], _: grpc.ServicerContext
    ) -> Iterator[service_pb2.ModelStreamInferResponse]:
        for request in requests:
            names = {one.name for one in request.inputs}
            if unknown := names - self._known:
                yield service_pb2.ModelStreamInferResponse(error_message=f"unexpected inference input {unknown}")
            elif "control" in names:
                yield from self._recorded["status"]["responses"]
            else:
                yield from self._recorded["everything" if "return_logprobs" in names else "plain"]["responses"]


def inputs_of(recorded: Recording) -> set[Any]:
    """Each tensor that its requests have."""

    class Input(msgspec.Struct, frozen=True):
        name: str
        datatype: str

    messages = [case["request"] for case in recorded.values()]
    return {Input(one.name, one.datatype) for message in messages for one in message.inputs}


def text_of(recorded: Recording, name: str) -> str:
    """What a client has to get."""
    raw = [one.infer_response.raw_output_contents[0] for one in recorded[name]["responses"]]
    return "".join(one[4 : 4 + struct.unpack("<I", one[:4])[0]].decode() for one in raw)


def test_a_gateway_works_with_a_replica_of_the_version_before(model_dir: Path, recorded: Recording) -> None:
    with (
        RecordedReplica(recorded) as replica,
        RunningGateway(model_dir, replica, trace_sample_ratio=0) as gateway,  # type: ignore[arg-type]
    ):
        for stream in (False, True):
            body = {"prompt": "x", "max_tokens": 4, "temperature": 0, "stream": stream}
            answer = gateway.post("/v1/completions", body)
            assert answer.status_code == 200
            if not stream:
                assert answer.json()["choices"][0]["text"] == text_of(recorded, "plain")
                assert answer.json()["choices"][0]["finish_reason"] == "length"
            else:
                assert answer.text.endswith("data: [DONE]\n\n")
        answer = gateway.post("/v1/completions", {"prompt": "x", "max_tokens": 3, "logprobs": 1, "echo": False})
        assert answer.status_code == 200
        choice = answer.json()["choices"][0]
        assert choice["text"] == text_of(recorded, "everything")
        assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) == 2
        assert gateway.http.get("/health/ready").status_code == 200


def test_a_replica_knows_all_that_a_gateway_of_the_version_before_asks(recorded: Recording) -> None:
    known = {spec.name: spec.dtype.removeprefix("TYPE_").replace("STRING", "BYTES") for spec in DECODER_INPUTS}
    assert {one.name: one.datatype for one in inputs_of(recorded)}.items() <= known.items()
    for case in recorded.values():
        inputs = zip((one.name for one in case["request"].inputs), case["request"].raw_input_contents, strict=True)
        if sampling := dict(inputs).get("sampling_parameters"):
            msgspec.json.decode(sampling[4:], type=SamplingParams)


@pytest.mark.server
def test_a_real_replica_answers_a_gateway_of_the_version_before(server: RunningServer, recorded: Recording) -> None:
    """With tensors of the same names and types, in the same places, so that it reads them as it did."""
    with grpc.insecure_channel(server.grpc_url) as channel:
        method = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
        for name, case in recorded.items():
            answers = list(itertools.islice(method(iter([case["request"]]), timeout=60), 50))
            assert [one.error_message for one in answers] == [""] * len(answers)
            assert outputs_of(answers) >= outputs_of(case["responses"]), name
    status = status_of(answers_to_status := recorded["status"]["responses"])
    assert answers_to_status
    known = msgspec.json.decode(status, type=dict[str, Any])
    with grpc.insecure_channel(server.grpc_url) as channel:
        method = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
        now = msgspec.json.decode(status_of(list(method(iter([recorded["status"]["request"]])))), type=dict[str, Any])
    assert {name: type(value) for name, value in known.items()}.items() <= {
        name: type(value) for name, value in now.items()
    }.items()
    assert now["protocol"] == PROTOCOL


def outputs_of(responses: list[service_pb2.ModelStreamInferResponse]) -> set[tuple[str, str]]:
    return {(one.name, one.datatype) for response in responses for one in response.infer_response.outputs}


def status_of(responses: list[service_pb2.ModelStreamInferResponse]) -> bytes:
    return bytes(responses[0].infer_response.raw_output_contents[0][4:])


def test_a_status_without_a_protocol_is_of_protocol_1(recorded: Recording) -> None:
    status = status_of(recorded["status"]["responses"])
    assert b"protocol" not in status
    assert read_status(status.decode()).protocol == 1 == OLDEST_PROTOCOL


class LaterStatus(msgspec.Struct):
    """Of a version of which this one knows nothing but the number: the other fields say other things."""

    protocol: int
    trouble: list[str] = []


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (LaterStatus(7), f"speaks protocol 7, this gateway {OLDEST_PROTOCOL} to {PROTOCOL}: the gateway is too old"),
        (msgspec.structs.replace(WELL, protocol=PROTOCOL + 1), f"speaks protocol {PROTOCOL + 1}, this gateway"),
        (LaterStatus(0), "is it a Tidewright server?"),
        (LaterStatus(PROTOCOL), "is it a Tidewright server?"),
    ],
)
def test_a_replica_of_another_protocol_gets_nothing_until_it_is_replaced(
    client: type[ScriptedClient], status: DecoderStatus, why: str
) -> None:
    client.status = {"b:1": status}
    client.scripts = {"a:1": [[1]] * 9, "b:1": [[2]] * 9}

    async def body(failover: Failover) -> None:
        assert why in named(failover, "b:1").why_not
        assert [(await generate(failover))[1].served_by for _ in range(3)] == [["a:1"]] * 3
        client.status = {"b:1": msgspec.structs.replace(WELL, protocol=PROTOCOL)}
        await until(lambda: named(failover, "b:1").takes_requests)
        assert ["b:1"] in [(await generate(failover))[1].served_by for _ in range(2)]

    run(body, slow_start=0)


def test_an_older_replica_than_the_one_before_is_refused_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none yet: the numbers of a later gateway."""
    from tidewright_gateway.replicas import health

    monkeypatch.setattr(health, "OLDEST_PROTOCOL", 3)
    monkeypatch.setattr(health, "PROTOCOL", 4)
    with pytest.raises(Exception, match="speaks protocol 2, this gateway 3 to 4: the replica is too old; upgrade"):
        read_status(msgspec.json.encode(msgspec.structs.replace(WELL, protocol=2)).decode())
