"""A Triton over real gRPC that says on its streams what a test wants, when it wants. It obeys control words."""

from __future__ import annotations

import json
import queue
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tidewright.bench.machine import free_ports
from tidewright.schema import CANCEL, CONTROL

PATIENCE = 20.0  # seconds
_END = object()


class ScriptedCall:
    """One ModelStreamInfer call."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context
        self.said: queue.Queue[Any] = queue.Queue()
        self.requests: queue.Queue[service_pb2.ModelInferRequest | None] = queue.Queue()
        """None: the client sends nothing more."""

    def next_request(self) -> service_pb2.ModelInferRequest:
        request = self.requests.get(timeout=PATIENCE)
        assert request is not None
        return request

    def tensors(self, request: service_pb2.ModelInferRequest) -> dict[str, bytes]:
        return dict(zip((one.name for one in request.inputs), request.raw_input_contents, strict=True))

    def say(self, request_id: str, *, final: bool = False, **outputs: bytes) -> None:
        response = service_pb2.ModelStreamInferResponse()
        inner = response.infer_response
        inner.model_name, inner.id = "decoder", request_id
        inner.parameters["triton_final_response"].bool_param = final
        for name, raw in outputs.items():
            inner.outputs.add(name=name, shape=[1])
            inner.raw_output_contents.append(raw)
        self.said.put(response)

    def token(self, request_id: str, text: str, reason: str = "None", **outputs: bytes) -> None:
        self.say(
            request_id,
            final=reason != "None",
            text_output=texts(text),
            output_ids=struct.pack("<i", 7),
            finish_reason=texts(reason),
            num_input_tokens=struct.pack("<I", 3),
            **outputs,
        )

    def error(self, request_id: str, message: str) -> None:
        response = service_pb2.ModelStreamInferResponse(error_message=message)
        response.infer_response.id = request_id
        self.said.put(response)

    def obey(self, request: service_pb2.ModelInferRequest) -> None:
        word = self.tensors(request)[CONTROL.name][4:].decode()
        if word.startswith(CANCEL):
            self.error(word.removeprefix(CANCEL), "cancelled by its id [cancelled]")
        self.say(request.id, final=True, text_output=texts("ok"))

    def end(self, code: grpc.StatusCode | None = None) -> None:
        self.said.put(code or _END)

    def responses(self) -> Iterator[service_pb2.ModelStreamInferResponse]:
        while (said := self.said.get()) is not _END:
            if isinstance(said, grpc.StatusCode):
                self._context.abort(said, "scripted")
            yield said


class ScriptedStream(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self) -> None:
        self.calls: queue.Queue[ScriptedCall] = queue.Queue()
        self._open: list[ScriptedCall] = []
        self._server, self._readers = grpc.server(ThreadPoolExecutor(16)), ThreadPoolExecutor(16)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        (self.port,) = free_ports(1)
        self.address = f"127.0.0.1:{self.port}"
        self._server.add_insecure_port(self.address)

    def __enter__(self) -> ScriptedStream:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        for call in self._open:
            call.end()
        self._server.stop(0).wait()

    def next_call(self) -> ScriptedCall:
        return self.calls.get(timeout=PATIENCE)

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> service_pb2.ModelInferResponse:  # noqa: N802
        """The tokenizer: an id for each message."""
        (raw,) = request.raw_input_contents
        count = len(json.loads(raw[4:]))
        response = service_pb2.ModelInferResponse(model_name="tokenizer", id=request.id)
        response.outputs.add(name="input_ids", datatype="INT32", shape=[1, count])
        response.raw_output_contents.append(struct.pack(f"<{count}i", *range(count)))
        return response

    def ModelStreamInfer(self, requests: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        call = ScriptedCall(context)
        self._open.append(call)
        self.calls.put(call)

        def read() -> None:
            try:
                for request in requests:
                    call.requests.put(request)
                    if CONTROL.name in call.tensors(request):
                        call.obey(request)
            except grpc.RpcError:  # the client cancelled the call
                pass
            call.requests.put(None)
            call.end()

        self._readers.submit(read)
        yield from call.responses()


def texts(*values: str) -> bytes:
    """A BYTES tensor."""
    return b"".join(struct.pack("<I", len(raw)) + raw for raw in (value.encode() for value in values))
