"""Shapes, types and sizes that no client should send, at every endpoint: each gets an answer, and no process dies.

Left out, by name, is what Triton 2.51 does before a model sees the request; docs/api.md has it under "What Triton does
not withstand".
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from helpers.processes import processes
from helpers.triton import RunningServer
from tidewright import schema

MODELS = {
    "tokenizer": schema.TOKENIZER_INPUTS,
    "decoder": schema.DECODER_INPUTS,
    "failsafe": schema.FAILSAFE_INPUTS,
    "generate": schema.GENERATE_INPUTS,
    "generate_direct": schema.GENERATE_INPUTS,
}
SIZES = {"BYTES": 0, "BOOL": 1, "INT32": 4, "INT64": 8, "UINT8": 1, "FP32": 4, "FP16": 2, "nonsense": 4, "": 4}
TYPES = {"TYPE_STRING": "BYTES", "TYPE_BOOL": "BOOL", "TYPE_INT32": "INT32"}
SHAPES: list[list[int]] = [
    *([1], [1], [1, 1], [0], [], [2], [1, 0], [1, 1, 1, 1], [65, 1], [4096], [5000]),
    *([-1], [2**31 - 1], [2**31], [2**40], [2**61], [2**62], [2**63 - 1], [-(2**62)], [2**31, 2**31], [2**62, 4]),
]
TEXTS = ["x", "", "\0", "\ud83d".encode("utf-8", "surrogatepass"), b"\xff\xfe", "a" * 100_000, "[" * 10_000, "{}", "[]"]
PROMPT = "The capital of France is"
GREEDY = {"temperature": 0, "max_tokens": 4}
TIMEOUT = 120.0  # seconds


def wraps_around(shape: list[int], size: int) -> bool:
    """Triton counts the bytes modulo 2^64; what comes out small passes, and the stub's C++ ends with an exception."""
    return bool(shape) and abs(math.prod(shape) * size) >= 2**63 and (math.prod(shape) * size) % 2**64 < 2**32


def is_allocated(shape: list[int]) -> bool:
    """Triton's HTTP server allocates what the shape of JSON data says, and dies if there is not so much."""
    return abs(math.prod(shape)) > 2**24


@pytest.fixture(autouse=True)
def _server_unharmed(server: RunningServer) -> Iterator[None]:
    def answer() -> list[int]:
        got = server.generate("failsafe", text_input=PROMPT, sampling_parameters=GREEDY)
        assert got.error is None
        return got.token_ids

    expected, before = answer(), processes(server)
    yield
    assert answer() == expected
    assert before <= processes(server)
    server.wait_idle()


def contents(rng: random.Random, datatype: str, shape: list[int]) -> bytes:
    """Of the length that the shape says, or of another."""
    count = math.prod(shape) if all(0 <= side <= 5000 for side in shape) and math.prod(shape) <= 5000 else 1
    if rng.random() < 0.2:
        return rng.choice([b"", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7fabc", rng.randbytes(7), rng.randbytes(100_000)])
    if datatype == "BYTES":
        texts = [rng.choice(TEXTS) for _ in range(min(count, 4))]
        encoded = [text if isinstance(text, bytes) else text.encode() for text in texts]
        return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
    return rng.randbytes(SIZES[datatype] * count)


def inputs(rng: random.Random, model: str) -> list[tuple[str, str, list[int]]]:
    """Some of the model's inputs, or one that it has not; name, type and shape of each, mostly wrong."""
    names = rng.sample(MODELS[model], min(rng.randrange(1, 4), len(MODELS[model])))
    found = [(spec.name, TYPES[spec.dtype]) for spec in names] + [("nonsense", "INT32")] * (rng.random() < 0.05)
    return [
        (name, rng.choice(list(SIZES)) if rng.random() < 0.3 else datatype, rng.choice(SHAPES))
        for name, datatype in found
    ]


@pytest.mark.parametrize("seed", range(3))
def test_grpc(server: RunningServer, seed: int) -> None:
    rng = random.Random(seed)
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(60):
            model = rng.choice(list(MODELS))
            request = service_pb2.ModelInferRequest(model_name=model)
            for name, datatype, shape in inputs(rng, model):
                if wraps_around(shape, SIZES[datatype]):
                    continue
                tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
                if rng.random() < 0.1:
                    tensor.contents.int_contents.extend([1, 2])
                else:
                    request.raw_input_contents.append(contents(rng, datatype, shape))
            call = stub.ModelStreamInfer(iter([request]), timeout=TIMEOUT)
            with contextlib.suppress(grpc.RpcError):
                assert list(call)
            assert call.code() is not grpc.StatusCode.DEADLINE_EXCEEDED, request


@pytest.mark.parametrize("seed", range(3))
def test_http_infer(server: RunningServer, seed: int) -> None:
    rng = random.Random(seed)
    with httpx.Client(base_url=server.triton.http_url, timeout=TIMEOUT, trust_env=False) as client:
        for _ in range(60):
            # Triton takes no decoupled model here, and says so with 501.
            model, tail, described = rng.choice(["tokenizer", "tokenizer", *MODELS]), b"", []
            is_binary = rng.random() < 0.5
            for name, datatype, shape in inputs(rng, model):
                if wraps_around(shape, SIZES[datatype]) or (not is_binary and is_allocated(shape)):
                    continue
                entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
                if is_binary:
                    data = contents(rng, datatype, shape)
                    tail += data
                    entry["parameters"] = {"binary_data_size": len(data) + rng.choice([0, 0, 0, 1, -1, 2**40])}
                else:
                    entry["data"] = rng.choice([["x"], [1], [True], [], [[1]], [None], [2**40], [1.5], "x", 5, {}])
                described.append(entry)
            head = json.dumps({"inputs": described}).encode()
            headers = {"Inference-Header-Content-Length": str(len(head))} if is_binary else {}
            answer = client.post(f"/v2/models/{model}/infer", content=head + tail, headers=headers)
            assert answer.status_code in (200, 400, 500, 501), answer.text


VALUES: list[Any] = [
    *(None, True, 0, -1, 1.5, 2**31, 2**40, 2**63, 2**64, "", "x", "\0", "1e999", "NaN"),
    *([], [1], ["x"], [[1]], {}, {"a": 1}),
    *([0] * 5000, [2**40], "x" * 100_000, "[" * 10_000, '{"max_tokens": 2}', '{"top_k": 1e30}', {"max_tokens": 4}),
]


@pytest.mark.parametrize("seed", range(3))
def test_http_generate(server: RunningServer, seed: int) -> None:
    rng = random.Random(seed)
    with httpx.Client(base_url=server.triton.http_url, timeout=TIMEOUT, trust_env=False) as client:
        for _ in range(40):
            model = rng.choice([name for name in MODELS if name != "tokenizer"])
            fields = {rng.choice(MODELS[model]).name: rng.choice(VALUES) for _ in range(rng.randrange(3))}
            fields |= {
                rng.choice(schema.SamplingParams.__struct_fields__): rng.choice(VALUES) for _ in range(rng.randrange(3))
            }
            if fields.get("control") == "drain":
                continue
            body = {"text_input": PROMPT, **fields}
            how = rng.choice(["generate", "generate_stream"])
            answer = client.post(f"/v2/models/{model}/{how}", content=json.dumps(body).encode())
            assert answer.status_code in (200, 400, 500), answer.text
