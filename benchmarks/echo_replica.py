"""A replica that answers at once, so that what is measured in front of it is the gateway's own cost.

It speaks what the gateway asks of a Triton: `decoder` over `ModelStreamInfer`, and `control`. It decodes no request but
one that goes on, and its responses are serialized once: `max_tokens` tokens, so many to a response as it was told.
`python -m benchmarks.echo_replica --port 8001`; the benchmarks start it themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import struct
from functools import cache

import grpc
import grpc.aio
import msgspec
import uvloop
from tritonclient.grpc import service_pb2

from tidewright.schema import CONTROL, RESUME_IDS, DecoderStatus

SERVICE, METHOD = "inference.GRPCInferenceService", "ModelStreamInfer"
PROBES = b"probes"  # a control word of its own: how often it was asked for its status
_CONTROL, _RESUME_IDS = CONTROL.name.encode(), RESUME_IDS.name.encode()
_MAX_TOKENS = re.compile(rb'"max_tokens":(\d+)')
_DEFAULT_TOKENS = 16  # the gateway leaves out what is the default
WORD, TOKEN = b" word", 2


def _response(**outputs: bytes) -> bytes:
    response = service_pb2.ModelStreamInferResponse()
    for name, raw in outputs.items():
        response.infer_response.outputs.add(name=name, shape=[1])
        response.infer_response.raw_output_contents.append(raw)
    return response.SerializeToString()


def _text(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def _status() -> bytes:
    status = DecoderStatus("", False, 0.0, 0.0, 0.0, 0.0, max_model_len=8192, max_running=4096)
    return _response(text_output=_text(msgspec.json.encode(status)))


def _num_resumed(request: bytes) -> int:
    """Tokens that another replica, or this one, has generated of it."""
    if _RESUME_IDS not in request:
        return 0
    decoded = service_pb2.ModelInferRequest.FromString(request)
    inputs = zip(decoded.inputs, decoded.raw_input_contents, strict=True)
    return next(len(raw) // 4 for tensor, raw in inputs if tensor.name == RESUME_IDS.name)


class Echo:
    def __init__(self, per_response: int, pause: float) -> None:
        """`per_response`: tokens in one; `pause`: seconds before each but the first."""
        self._per_response, self._pause = per_response, pause
        self._status, self._num_probes = _status(), 0
        self._answers = cache(self._answer)

    def _answer(self, total: int) -> list[bytes]:
        sizes = [min(self._per_response, total - done) for done in range(0, total, self._per_response)]
        return [
            _response(
                text_output=_text(WORD * size),
                output_ids=struct.pack("<i", TOKEN) * size,
                finish_reason=_text(b"length" if number == len(sizes) else b"None"),
            )
            for number, size in enumerate(sizes, 1)
        ]

    async def stream(self, _: object, context: grpc.aio.ServicerContext) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            if _CONTROL in request:
                await context.write(self._control(request))
                continue
            found = _MAX_TOKENS.search(request)
            left = (int(found[1]) if found else _DEFAULT_TOKENS) - _num_resumed(request)
            for number, response in enumerate(self._answers(left)):
                if number and self._pause:
                    await asyncio.sleep(self._pause)
                await context.write(response)

    def _control(self, request: bytes) -> bytes:
        if PROBES in request:
            return _response(text_output=_text(str(self._num_probes).encode()))
        self._num_probes += 1
        return self._status


async def start(port: int, echo: Echo) -> grpc.aio.Server:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handler = grpc.stream_stream_rpc_method_handler(echo.stream)  # bytes in, bytes out
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server


async def serve(port: int, echo: Echo) -> None:
    server = await start(port, echo)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--per-response", type=int, default=1, help="tokens in one response")
    parser.add_argument("--pause", type=float, default=0, help="seconds between two responses")
    options = parser.parse_args()
    uvloop.run(serve(options.port, Echo(options.per_response, options.pause)))


if __name__ == "__main__":
    main()
