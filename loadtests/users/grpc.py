"""Generations by Triton's KServe gRPC, as a stream, over one channel a user."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.experimental.gevent
from tritonclient.grpc import service_pb2, service_pb2_grpc

from loadtests import prompts
from loadtests.options import Options
from loadtests.users.base import GenerationUser, RequestError, Tokens, Wanted

CHANNEL = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
OUTPUT = "output_ids"


def request(number: int, model: str, ids: list[int], max_tokens: int) -> service_pb2.ModelInferRequest:
    options = json.dumps({"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.7})
    made = service_pb2.ModelInferRequest(model_name=model, id=f"loadtest-{number}")
    made.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, datatype, size, raw in (
        ("input_ids", "INT32", len(ids), struct.pack(f"<{len(ids)}i", *ids)),
        ("stream", "BOOL", 1, b"\x01"),
        ("sampling_parameters", "BYTES", 1, struct.pack("<I", len(options)) + options.encode()),
    ):
        made.inputs.add(name=name, datatype=datatype, shape=[size])
        made.raw_input_contents.append(raw)
    return made


class GrpcCaller:
    def __init__(self, options: Options) -> None:
        grpc.experimental.gevent.init_gevent()
        self._options = options
        self._channel = grpc.insecure_channel(options.grpc, CHANNEL)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._numbers = itertools.count(1)

    def call(self, wanted: Wanted, tokens: Tokens) -> bool:
        ids = prompts.ids(wanted.rng, wanted.lengths.prompt)
        made = request(next(self._numbers), self._options.triton_model, ids, wanted.lengths.answer)
        tokens.prompt = len(ids)
        # The deadline is of the whole call: gRPC has none for silence.
        call = self._stub.ModelStreamInfer(iter([made]), timeout=self._options.silence * 10)
        try:
            return self._read(call, wanted, tokens)
        except grpc.RpcError as error:
            raise RequestError(f"gRPC {error.code().name}: {error.details()}") from None

    def _read(self, call: Iterator[Any], wanted: Wanted, tokens: Tokens) -> bool:
        arrivals, ended = 0, False
        for response in call:  # to the end of the call: Triton leaks what is cancelled after its last response
            if response.error_message:
                raise RequestError(f"gRPC: {response.error_message}")
            answer = response.infer_response
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
                if output.name == OUTPUT and raw:
                    tokens.arrived()
                    tokens.output += len(raw) // 4
                    arrivals += 1
            ended = ended or answer.parameters["triton_final_response"].bool_param
            if arrivals == wanted.leaves_after > 0 and tokens.output < wanted.lengths.answer:
                call.cancel()  # type: ignore[attr-defined]
                return False
        if not ended:
            raise RequestError("the stream ended without its last response")
        return True

    def close(self) -> None:
        self._channel.close()


class GrpcUser(GenerationUser):
    protocol = "grpc"
    make = GrpcCaller
