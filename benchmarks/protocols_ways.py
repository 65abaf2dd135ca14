"""Ways to ask a Triton for the same: REST with JSON, gRPC with binary tensors, OpenAI's API through the gateway.

Each makes its request from Python's values and makes such of the answer, as any client has to. What they send with is
as cheap as it gets in Python: sockets of asyncio for HTTP, grpc.aio for gRPC; and httpx, for what people use.
"""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import httpx
from tritonclient.grpc import service_pb2

from benchmarks.gateway_load import Answer, HttpClient, post
from benchmarks.gateway_parts import MODEL
from tidewright_client.triton import AsyncTritonClient, wire
from tidewright_client.triton.calls import CHANNEL_OPTIONS, INFER, tokenizer_request
from tidewright_gateway.replicas.triton import CallRequest, TritonClient

REST, HTTPX, GRPC, CALLS, OPENAI = "REST/JSON", "REST/JSON, httpx", "gRPC", "gRPC, a call each", "OpenAI HTTP"
LIVE = "/inference.GRPCInferenceService/ServerLive"


@dataclass(frozen=True)
class Work:
    """What is asked for; the same whoever is asked."""

    name: str
    kind: str
    """`generate`, `tokenize`, `health`, `live`, or `embed`, which needs a server of its own."""
    prompt: str = ""
    input_ids: list[int] = field(default_factory=list)
    tokens: int = 1
    streams: bool = False
    logprobs: int | None = None
    callers: int = 32
    """At once, for the rate."""

    @property
    def sampling(self) -> dict[str, Any]:
        more = {} if self.logprobs is None else {"logprobs": self.logprobs}
        return {"max_tokens": self.tokens, "temperature": 0, "ignore_eos": True, **more}


Ask = Callable[[], Awaitable[Any]]


class HttpxClient:
    """As HttpClient, by what people use."""

    def __init__(self, port: int) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        url = f"http://127.0.0.1:{port}"
        self._client = httpx.AsyncClient(base_url=url, trust_env=False, timeout=60, limits=limits)

    async def send(self, raw: bytes) -> Answer:
        head, _, body = raw.partition(b"\r\n\r\n")
        method, path, _ = head.split(b" ", 2)
        headers = {"content-type": "application/json"}
        response = await self._client.request(method.decode(), path.decode(), content=body or None, headers=headers)
        return Answer(status=response.status_code, body=response.content)

    async def close(self) -> None:
        await self._client.aclose()


class Rest:
    """Triton's own HTTP."""

    def __init__(self, port: int) -> None:
        self._http: Any = HttpClient(port)

    def way(self, work: Work) -> Ask:
        kinds = {"generate": self._generate, "tokenize": self._tokenize, "embed": self._embed}
        return {**kinds, "health": self._health, "live": self._live}[work.kind](work)

    def _generate(self, work: Work) -> Ask:
        path = f"/v2/models/decoder/generate{'_stream' if work.streams else ''}"

        async def ask() -> Any:
            body = {
                **({"input_ids": work.input_ids} if work.input_ids else {"text_input": work.prompt}),
                "sampling_parameters": json.dumps(work.sampling),
                "exclude_input_in_output": True,
                "return_finish_reason": True,
                "return_num_input_tokens": True,
                **({"stream": True} if work.streams else {}),
                **({"return_logprobs": True} if work.logprobs is not None else {}),
            }
            answer = checked(await self._http.send(post(json.dumps(body).encode(), path)))
            if not work.streams:
                whole = json.loads(content(answer))
                ids = whole["output_ids"]
                if work.logprobs is not None:
                    json.loads(whole["logprobs"])
                return ids if isinstance(ids, list) else [ids]
            return [token for event in events(answer) for token in as_list(event["output_ids"])]

        return ask

    def _tokenize(self, work: Work) -> Ask:
        async def ask() -> Any:
            body = {"inputs": [{"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": [work.prompt]}]}
            answer = checked(await self._http.send(post(json.dumps(body).encode(), "/v2/models/tokenizer/infer")))
            return json.loads(content(answer))["outputs"][0]["data"]

        return ask

    def _embed(self, work: Work) -> Ask:
        async def ask() -> Any:
            body = json.dumps({"text_input": work.prompt, "embed": True, "return_num_input_tokens": True}).encode()
            answer = checked(await self._http.send(post(body, "/v2/models/decoder/generate")))
            return json.loads(content(answer))["embedding"]

        return ask

    def _health(self, work: Work) -> Ask:
        async def ask() -> Any:
            body = json.dumps({"control": "health"}).encode()
            answer = checked(await self._http.send(post(body, "/v2/models/decoder/generate")))
            return json.loads(content(answer))["text_output"]

        return ask

    def _live(self, work: Work) -> Ask:
        async def ask() -> Any:
            raw = b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
            return checked(await self._http.send(raw)).status == 200

        return ask

    async def close(self) -> None:
        self._http.close()


class RestByHttpx(Rest):
    def __init__(self, port: int) -> None:
        self._http = HttpxClient(port)

    async def close(self) -> None:
        await self._http.close()


class Grpc:
    """Triton's gRPC: calls of their own where there is one answer, else the pooled stream of the Python client."""

    def __init__(self, port: int) -> None:
        address = f"127.0.0.1:{port}"
        self._client = AsyncTritonClient(address, max_retries=0)
        self._channel = grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)

    def way(self, work: Work) -> Ask:
        kinds = {"generate": self._generate, "tokenize": self._tokenize, "embed": self._embed}
        return {**kinds, "health": self._health, "live": self._live}[work.kind](work)

    def _generate(self, work: Work) -> Ask:
        given: dict[str, Any] = {"input_ids": work.input_ids} if work.input_ids else {"prompt": work.prompt}
        given |= {"model": "decoder", **work.sampling}

        async def whole() -> Any:
            return (await self._client.generate(**given)).token_ids

        async def streamed() -> Any:
            return [token async for piece in self._client.stream(**given) for token in piece.token_ids]

        return streamed if work.streams else whole

    def _tokenize(self, work: Work) -> Ask:
        method = self._channel.unary_unary(
            INFER,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )

        async def ask() -> Any:
            return wire.ids_of(wire.whole_reply(await method(tokenizer_request(work.prompt, None))))

        return ask

    def _embed(self, work: Work) -> Ask:
        async def ask() -> Any:
            return (await self._client.embed(work.prompt)).vector

        return ask

    def _health(self, work: Work) -> Ask:
        async def ask() -> Any:
            return "ok" if await self._client.health("decoder") else "not well"

        return ask

    def _live(self, work: Work) -> Ask:
        method = self._channel.unary_unary(
            LIVE,
            request_serializer=service_pb2.ServerLiveRequest.SerializeToString,
            response_deserializer=service_pb2.ServerLiveResponse.FromString,
        )

        async def ask() -> Any:
            return (await method(service_pb2.ServerLiveRequest())).live

        return ask

    async def close(self) -> None:
        await self._client.close()
        await self._channel.close()


class Calls:
    """Triton's gRPC by the gateway's own client, which makes a call of each request where `Grpc` shares a stream."""

    def __init__(self, port: int) -> None:
        self._client = TritonClient(f"127.0.0.1:{port}", 2)

    def way(self, work: Work) -> Ask | None:
        if work.kind == "health":
            return self._health
        return self._generate(work) if work.kind == "generate" and work.input_ids else None

    async def _health(self) -> Any:
        return await self._client.control("health", 30)

    def _generate(self, work: Work) -> Ask:
        async def ask() -> Any:
            request = CallRequest(uuid.uuid4().hex, work.input_ids, json.dumps(work.sampling).encode())
            call, ids = self._client.generate("decoder", request), list[int]()
            try:
                while True:
                    reply = await call.read()
                    ids += reply.token_ids
                    if reply.finish_reason:
                        return ids
            finally:
                call.close()

        return ask

    async def close(self) -> None:
        await self._client.close()


class OpenAI:
    """Through the gateway; it has no work without a model."""

    def __init__(self, port: int) -> None:
        self._http = HttpClient(port)

    def way(self, work: Work) -> Ask | None:
        if work.kind == "embed":
            return lambda: self._embed(work)
        if work.kind != "generate":
            return None

        async def ask() -> Any:
            body = {"model": MODEL, "prompt": work.input_ids or work.prompt, "stream": work.streams, **work.sampling}
            answer = checked(await self._http.send(post(json.dumps(body).encode(), "/v1/completions")))
            # The ids are not in an answer of OpenAI's; the text is.
            if work.streams:
                return "".join(event["choices"][0]["text"] for event in events(answer) if event.get("choices"))
            return json.loads(content(answer))["choices"][0]["text"]

        return ask

    async def _embed(self, work: Work) -> Any:
        body = json.dumps({"model": MODEL, "input": work.prompt}).encode()
        return json.loads(content(checked(await self._http.send(post(body, "/v1/embeddings")))))["data"][0]["embedding"]

    async def close(self) -> None:
        self._http.close()


def checked(answer: Answer) -> Answer:
    if answer.error or answer.status != 200:
        raise SystemExit(f"status {answer.status}: {answer.error or answer.body[:300]!r}")
    return answer


def content(answer: Answer) -> bytes:
    """The body; one in chunks begins with the size of the first."""
    body = answer.body
    if body.startswith((b"{", b"[", b"data:")):
        return body
    joined, at = b"", 0
    while at < len(body):
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        joined += body[end + 2 : end + 2 + size]
        at = end + size + 4
    return joined


def events(answer: Answer) -> list[Any]:
    lines = (line.removeprefix(b"data:").strip() for line in content(answer).splitlines() if line.startswith(b"data:"))
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def as_list(value: Any) -> list[Any]:
    """Triton writes a tensor of one element as a plain value."""
    return value if isinstance(value, list) else [value]


def payload_of_ids(ids: list[int]) -> tuple[int, int]:
    """Bytes of token ids, as JSON and as a tensor."""
    return len(json.dumps(ids).encode()), len(struct.pack(f"<{len(ids)}i", *ids))
