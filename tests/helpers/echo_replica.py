"""A replica without a model, over real gRPC: `max_tokens` tokens of one text each, as fast as they are taken."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import msgspec
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tidewright.bench.machine import free_ports
from tidewright.schema import (
    CONTROL,
    EMBED,
    INPUT_IDS,
    LOAD_LORA,
    UNLOAD_LORA,
    AdapterOrder,
    AdapterStatus,
    DecoderStatus,
    SamplingParams,
)

TOKEN = 11  # the id of each of its tokens


class EchoReplica(service_pb2_grpc.GRPCInferenceServiceServicer):
    """`text` is that of a token, of which no answer has more than `limit`; `pause`: seconds before each.

    All three may be set at any time.
    """

    def __init__(
        self,
        text: str = " word",
        max_model_len: int = 8192,
        limit: int | None = None,
        certificate: tuple[str, str] | None = None,
    ) -> None:
        """`certificate`: PEM files of one and its key, for TLS; clients must show one that it has signed."""
        self.text, self.limit = text, limit
        self.pause = 0.0
        self.requests: list[tuple[int, SamplingParams]] = []
        """Tokens of the prompt and parameters, of each generation."""
        self.metadata: list[dict[str, Any]] = []
        """Of the same."""
        self.sent = 0  # tokens
        self.status = DecoderStatus(
            "", False, 0.0, 0.0, 0.0, 0.0, max_model_len=max_model_len, knows_tenants=True, knows_targets=True
        )
        self.statuses: dict[str, DecoderStatus] = {}
        """Of models that have another than the rest."""
        self.errors: dict[str, str] = {}
        """Of each model that answers with an error."""
        self.commands: list[str] = []
        """About models, and about LoRA adapters, which it serves if its status has a list of them."""
        self.refusals: dict[str, str] = {}
        """Of adapters and models, by name."""
        self.away: set[str] = set()
        """Models that are not loaded."""
        self.asked: list[str] = []
        """The model of each generation."""
        self.go_on = threading.Event()
        """Clear it, and generations wait before their first token."""
        self.go_on.set()
        self._running, self._changed = 0, threading.Condition()
        (port,) = free_ports(1)
        self.grpc_url = f"127.0.0.1:{port}"
        options = [("grpc.max_receive_message_length", -1)]
        self._server = grpc.server(ThreadPoolExecutor(32), options=options)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        if certificate:
            chain, key = (Path(name).read_bytes() for name in certificate)
            credentials = grpc.ssl_server_credentials([(key, chain)], chain, require_client_auth=True)
            self._server.add_secure_port(self.grpc_url, credentials)
        else:
            self._server.add_insecure_port(self.grpc_url)

    def __enter__(self) -> EchoReplica:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()

    def wait_running(self, number: int, seconds: float) -> bool:
        """True as soon as so many generations run."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running == number, seconds)

    def RepositoryModelLoad(  # noqa: N802 - gRPC's name
        self, request: service_pb2.RepositoryModelLoadRequest, context: grpc.ServicerContext
    ) -> service_pb2.RepositoryModelLoadResponse:
        self.commands.append(f"load {request.model_name}")
        if error := self.refusals.get(request.model_name):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, error)
        self.away.discard(request.model_name)
        return service_pb2.RepositoryModelLoadResponse()

    def RepositoryModelUnload(  # noqa: N802
        self, request: service_pb2.RepositoryModelUnloadRequest, context: grpc.ServicerContext
    ) -> service_pb2.RepositoryModelUnloadResponse:
        self.commands.append(f"unload {request.model_name}")
        self.away.add(request.model_name)
        return service_pb2.RepositoryModelUnloadResponse()

    def ModelStreamInfer(  # noqa: N802 - gRPC's name
        self, requests: Iterator[service_pb2.ModelInferRequest], context: grpc.ServicerContext
    ) -> Iterator[service_pb2.ModelStreamInferResponse]:
        for request in requests:
            inputs = dict(zip((one.name for one in request.inputs), request.raw_input_contents, strict=True))
            if request.model_name in self.away:
                unknown = f"Request for unknown model: '{request.model_name}' is not found"
                yield service_pb2.ModelStreamInferResponse(error_message=unknown)
                continue
            if CONTROL.name not in inputs and not request.id.startswith("probe"):
                self.asked.append(request.model_name)
            if CONTROL.name in inputs:
                yield self._control(request.model_name, inputs[CONTROL.name][4:].decode())
            elif error := self.errors.get(request.model_name):
                yield service_pb2.ModelStreamInferResponse(error_message=error)
            elif EMBED.name in inputs:
                yield self._embed(request.model_name, inputs)
            else:
                yield from self._generate(request.model_name, inputs, context)

    def _control(self, model: str, word: str) -> service_pb2.ModelStreamInferResponse:
        answer, status = b"ok", self.statuses.get(model, self.status)
        if word == "drain":
            status = msgspec.structs.replace(status, draining=True)
        elif word.startswith((LOAD_LORA, UNLOAD_LORA)):
            command, _, text = word.partition(":")
            order = msgspec.json.decode(text, type=AdapterOrder)
            self.commands.append(f"{command} {order.name}")
            if error := self.refusals.get(order.name):
                return service_pb2.ModelStreamInferResponse(error_message=f"{error} [invalid]")
            done = AdapterStatus(order.name, order.path, command == "load_lora", order.at)
            others = [one for one in status.adapters or () if one.name != order.name]
            status = msgspec.structs.replace(status, adapters=[*others, done])
        else:
            answer = msgspec.json.encode(status)
        if model in self.statuses:
            self.statuses[model] = status
        else:
            self.status = status
        return _response("decoder", text_output=_text(answer))

    def _embed(self, model: str, inputs: dict[str, bytes]) -> service_pb2.ModelStreamInferResponse:
        sampling = msgspec.json.decode(inputs["sampling_parameters"][4:], type=SamplingParams)
        ids = struct.unpack(f"<{len(inputs[INPUT_IDS.name]) // 4}i", inputs[INPUT_IDS.name])
        self.requests.append((len(ids), sampling))
        self.go_on.wait(60)
        time.sleep(self.pause)
        return _response(model, embedding=struct.pack("<4f", *embedding_of(ids)))

    def _generate(
        self, model: str, inputs: dict[str, bytes], context: grpc.ServicerContext
    ) -> Iterator[service_pb2.ModelStreamInferResponse]:
        sampling = msgspec.json.decode(inputs["sampling_parameters"][4:], type=SamplingParams)
        self.requests.append((len(inputs[INPUT_IDS.name]) // 4, sampling))
        self.metadata.append(dict(context.invocation_metadata()))
        self._count(1)
        context.add_callback(lambda: self._count(-1))
        entry = {"logprob": -0.5, "rank": 1, "decoded_token": self.text}
        logprobs = {"logprobs": _text(msgspec.json.encode([{TOKEN: entry}]))} if "return_logprobs" in inputs else {}
        self.go_on.wait(60)
        number, last = 0, min(sampling.max_tokens, self.limit or sampling.max_tokens)
        while context.is_active() and number < last:
            time.sleep(self.pause)
            number += 1
            self.sent += 1
            yield _response(
                model,
                text_output=_text(self.text.encode()),
                output_ids=struct.pack("<i", TOKEN),
                finish_reason=_text(b"length" if number == last else b"None"),
                **logprobs,
            )

    def _count(self, change: int) -> None:
        with self._changed:
            self._running += change
            self._changed.notify_all()


def embedding_of(ids: Sequence[int]) -> tuple[float, float, float, float]:
    """What an EchoReplica gives; its status must have an `embedding_size`."""
    return (3.0, 4.0, float(len(ids)), float(ids[0]))


def _response(model: str, **outputs: bytes) -> service_pb2.ModelStreamInferResponse:
    response = service_pb2.ModelStreamInferResponse()
    response.infer_response.model_name = model
    for name, raw in outputs.items():
        response.infer_response.outputs.add(name=name, shape=[1])
        response.infer_response.raw_output_contents.append(raw)
    return response


def _text(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value
