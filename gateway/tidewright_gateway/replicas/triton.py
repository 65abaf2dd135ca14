"""gRPC client of one Triton: streams of replies, and control words.

Builds the messages of `tritonclient`'s protocol itself: its objects pass each value through numpy, and a reply of one
token needs none.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import msgspec
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tidewright.logs import event
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import CONTROL, EMBED, EMBEDDING, INPUT_IDS, RESUME_IDS
from tidewright.tracing.trace_context import PARAMETER

log = logging.getLogger(__name__)

_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A connection per channel; by default, channels to one address share one.
    ("grpc.use_local_subchannel_pool", 1),
    # No keepalive: a server treats pings without data as an attack and ends all streams of the connection.
    # Reconnect soon after a replica recovers.
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
END_TIMEOUT = 5.0  # seconds from the last response of a stream to its end
_NOT_ENDED = b"\4\0\0\0None"  # as an element of a BYTES tensor: the finish_reason of all but the last response
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


@dataclass(frozen=True)
class CallRequest:
    """The input of one generation call."""

    request_id: str
    prompt: list[int]
    sampling: bytes  # JSON of SamplingParams
    resume_ids: list[int] = field(default_factory=list)
    logprobs: bool = False
    metadata: tuple[tuple[str, str], ...] = ()
    """gRPC metadata; Triton reads the trace context from it."""
    details: bool = False
    """Asks for stop_reason and num_cached_tokens."""
    embeds: bool = False
    """Asks for the prompt's embedding instead of text."""
    traceparent: str = ""
    """Sampled or not, for logs; a parameter and not metadata, or Triton would trace it."""
    timings: bool = False
    """Asks where its time went."""


def least_of(served_by: Collection[str]) -> str:
    """Of those that answered parts of a request, the one to name: who promises the least."""
    return next((name for name in ("fallback", "smaller") if name in served_by), "decoder")


@dataclass(frozen=True)
class Reply:
    """One response to a generation call."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: bytes | None  # JSON, as docs/api.md describes it
    served_by: str = "decoder"
    """Who answered: decoder, fallback, or smaller (a variant of the model, by load)."""
    # Each in one reply of a call at most, and None in all others.
    prompt_logprobs: bytes | None = None
    """JSON, as docs/api.md describes it; with the first tokens, where the sampling parameter asks for it."""
    stop_reason: str | int | None = None
    """In the last reply: the stop string or the one of stop_token_ids that ended the text."""
    num_cached_tokens: int | None = None
    """With the first tokens: prompt tokens that the prefix cache had."""
    embedding: bytes | None = None
    """Of the prompt, instead of text: little-endian float32."""
    timings: bytes | None = None
    """In the last reply: JSON of schema.Timings, if asked for."""
    is_limited: bool = False
    """The last reply: not the model has ended the output, but the limits of the request's user (execution.py)."""


class _Connections:
    """Channels to one Triton; once retired, they are closed when the calls over them have ended."""

    def __init__(self, address: str, channels: int, credentials: grpc.ChannelCredentials | None) -> None:
        self._channels = [_channel(address, credentials) for _ in range(channels)]
        # Control words have a connection of their own, so that they do not queue behind streams.
        self._control_channel = _channel(address, credentials)
        self.control = _one_request(self._control_channel)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._control_channel)
        self.load, self.unload = stub.RepositoryModelLoad, stub.RepositoryModelUnload
        self.next_method = itertools.cycle([_one_request(channel) for channel in self._channels]).__next__
        self._calls, self._retired = 0, False

    async def close(self) -> None:
        for channel in (*self._channels, self._control_channel):
            await channel.close()

    def retire(self) -> None:
        self._retired = True
        self._close_if_unused()

    def joined(self) -> None:
        """A call began."""
        self._calls += 1

    def left(self) -> None:
        """A call ended, but for what Triton has to say after its last response."""
        self._calls -= 1
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._retired and not self._calls:
            _keep(_after(END_TIMEOUT, self.close))


class TritonClient:
    """Connections to one Triton, made on demand and re-established when broken."""

    def __init__(self, address: str, channels: int, credentials: grpc.ChannelCredentials | None = None) -> None:
        """`credentials`: None for plaintext connections."""
        self._address, self._channels = address, channels
        self._connections = _Connections(address, channels, credentials)

    async def close(self) -> None:
        await self._connections.close()

    def renew(self, credentials: grpc.ChannelCredentials) -> None:
        """Later calls use these; those that run are not disturbed."""
        self._connections.retire()
        self._connections = _Connections(self._address, self._channels, credentials)

    def generate(self, model: str, request: CallRequest) -> TritonCall:
        """A call of `decoder` or `fallback`; it is sent with the first read. Close it in any case."""
        connections = self._connections
        connections.joined()
        message = make_request(model, request)
        return TritonCall(connections.next_method(), message, request.metadata, connections.left)

    async def control(self, word: str, timeout: float, model: str = "decoder") -> str:
        """A model's answer to a word (schema.CONTROL).

        Raises:
            ModelError: it is an error, or none came within `timeout` seconds.
        """
        request = service_pb2.ModelInferRequest(model_name=model)
        _add(request, CONTROL.name, "BYTES", 1, _bytes_element(word.encode()))
        connections = self._connections
        connections.joined()
        call = connections.control(request, timeout=timeout)
        answered = False
        try:
            response = await call.read()
            answered = True
        except grpc.aio.AioRpcError as error:
            raise _model_error(error) from None
        except asyncio.InvalidStateError as error:
            raise ModelError(str(error), Outcome.UNAVAILABLE) from None
        finally:
            connections.left()
            if answered:
                let_end(call)
            else:
                call.cancel()
        if response is grpc.aio.EOF:
            raise ModelError("Triton closed the stream", Outcome.UNAVAILABLE)
        if response.error_message:
            raise ModelError(response.error_message)
        try:
            return _outputs(response.infer_response)["text_output"][4:].decode()
        except (LookupError, ValueError):
            raise ModelError("its answer is none of Tidewright's", Outcome.UNAVAILABLE) from None

    async def change(self, model: str, load: bool, timeout: float) -> None:
        """Loads or unloads a model; a load returns when the model is ready.

        Raises:
            ModelError: it could not be done, or not within `timeout` seconds.
        """
        connections = self._connections
        connections.joined()
        try:
            if load:
                await connections.load(service_pb2.RepositoryModelLoadRequest(model_name=model), timeout=timeout)
            else:
                await connections.unload(service_pb2.RepositoryModelUnloadRequest(model_name=model), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise _model_error(error) from None
        finally:
            connections.left()


class TritonCall:
    """One generation call. `abandon` may be called at any time."""

    def __init__(
        self,
        method: grpc.aio.UnaryStreamMultiCallable,
        request: service_pb2.ModelInferRequest,
        metadata: tuple[tuple[str, str], ...] = (),
        closed: Callable[[], None] | None = None,
    ) -> None:
        """`closed` is called once, by `close`."""
        self._closed = closed
        self._method, self._request, self._metadata = method, request, metadata
        self._call: grpc.aio.UnaryStreamCall | None = None
        self._abandoned: ModelError | None = None
        self._ended = False

    def abandon(self, error: ModelError) -> None:
        """Makes `read` raise this error, and cancels the call."""
        self._abandoned = error
        if self._call:
            self._call.cancel()

    async def read(self) -> Reply:
        """The next reply; only the last one has a finish_reason. The first read sends the request.

        Raises:
            ModelError: there is none.
        """
        if self._call is None:
            if self._abandoned:
                raise self._abandoned
            self._call = self._method(self._request, metadata=self._metadata)
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            # Its text names addresses, which callers must not see.
            log.debug("the call broke: %s", error.details(), extra=event("attempt_failed", request_id=self._request.id))
            gone = ModelError("the connection to the model broke", _model_error(error).outcome)
            raise self._abandoned or gone from None
        except (asyncio.CancelledError, asyncio.InvalidStateError):
            # grpc raises this as well if `abandon` cancelled the call rather than this task.
            if self._abandoned:
                raise self._abandoned from None
            raise
        if response is grpc.aio.EOF:
            raise ModelError("Triton ended the stream without a last response", Outcome.ENGINE_FAILED)
        if response.error_message:
            self._ended = True
            raise ModelError(response.error_message)
        try:
            reply = _reply(response.infer_response)
        except (LookupError, ValueError, TypeError, msgspec.MsgspecError) as error:  # as of another version
            raise ModelError(f"the model's answer can't be read ({error!r})", Outcome.ENGINE_FAILED) from None
        self._ended = reply.finish_reason is not None
        return reply

    def close(self) -> None:
        """Call it in any case. Cancels the call unless it has ended."""
        closed, self._closed = self._closed, None
        if closed:
            closed()
        if self._call is None:
            return
        if self._ended:
            let_end(self._call)
        else:
            self._call.cancel()


def _channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(address, _OPTIONS)
    return grpc.aio.secure_channel(address, credentials, _OPTIONS)


def _one_request(channel: grpc.aio.Channel) -> grpc.aio.UnaryStreamMultiCallable:
    """`ModelStreamInfer` with a single request: the same to Triton, and one step for grpc where a stream takes three.

    And no `write`, which waits for ever when the call is cancelled before it has begun.
    """
    return channel.unary_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
    )


_ending: set[asyncio.Task[None]] = set()  # the event loop alone does not keep a task alive


def _keep(job: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(job)
    _ending.add(task)
    task.add_done_callback(_ending.discard)


async def _after(seconds: float, job: Callable[[], Awaitable[None]]) -> None:
    await asyncio.sleep(seconds)
    await job()


def let_end(call: grpc.aio.UnaryStreamCall) -> None:
    """Reads a call to its end after its last response, without waiting for that.

    Triton (2.51) leaks about 20 kB for a call that is cancelled between its last response and its end, can't unload the
    call's model any more, and sometimes corrupts its memory.
    """
    _keep(_read_to_end(call))


async def _read_to_end(call: grpc.aio.UnaryStreamCall) -> None:
    async def read() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    try:
        await asyncio.wait_for(read(), END_TIMEOUT)
    except (grpc.aio.AioRpcError, asyncio.TimeoutError, asyncio.InvalidStateError):
        pass  # it ended in another way, or does not end
    finally:
        call.cancel()


def _model_error(error: grpc.aio.AioRpcError) -> ModelError:
    message = error.details() or error.code().name
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ModelError("no answer in time", Outcome.STALLED)
    return ModelError(message, Outcome.UNAVAILABLE if error.code() in _GONE else None)


def make_request(model: str, request: CallRequest) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name=model, id=request.request_id)
    _add_ids(message, INPUT_IDS.name, request.prompt)
    _add(message, "sampling_parameters", "BYTES", 1, _bytes_element(request.sampling))
    flags = (EMBED.name,) if request.embeds else ("stream", "exclude_input_in_output", "return_finish_reason")
    for flag in flags:
        _add(message, flag, "BOOL", 1, b"\1")
    if request.logprobs:
        _add(message, "return_logprobs", "BOOL", 1, b"\1")
    if request.details:
        for flag in ("return_stop_reason", "return_num_cached_tokens"):
            _add(message, flag, "BOOL", 1, b"\1")
    if request.timings:
        _add(message, "return_timings", "BOOL", 1, b"\1")
    if request.traceparent:
        message.parameters[PARAMETER].string_param = request.traceparent
    if request.resume_ids:
        _add_ids(message, RESUME_IDS.name, request.resume_ids)
    return message


def _add_ids(message: service_pb2.ModelInferRequest, name: str, ids: Sequence[int]) -> None:
    _add(message, name, "INT32", len(ids), struct.pack(f"<{len(ids)}i", *ids))


def _add(request: service_pb2.ModelInferRequest, name: str, datatype: str, count: int, raw: bytes) -> None:
    request.inputs.add(name=name, datatype=datatype, shape=[count])
    request.raw_input_contents.append(raw)


def _bytes_element(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def _outputs(response: service_pb2.ModelInferResponse) -> dict[str, bytes]:
    return {output.name: raw for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)}


def _reply(response: service_pb2.ModelInferResponse) -> Reply:
    outputs = _outputs(response)
    timings = outputs.get("timings")
    timings = timings[4:] if timings else None
    served_by = response.model_name.partition("_")[0]  # a further model has a decoder_NAME
    if embedding := outputs.get(EMBEDDING.name):
        return Reply("", [], "stop", None, served_by, embedding=embedding, timings=timings)
    ids, reason = outputs["output_ids"], outputs["finish_reason"]
    text, token_ids = outputs["text_output"][4:].decode(), memoryview(ids).cast("i").tolist()
    logprobs = outputs.get("logprobs")
    logprobs = logprobs[4:] if logprobs else None
    if reason == _NOT_ENDED and len(outputs) <= 4 - (logprobs is None):  # most of a stream: there is nothing else
        return Reply(text, token_ids, None, logprobs, served_by)
    prompt_logprobs = outputs.get("prompt_logprobs")
    stop_reason, cached = outputs.get("stop_reason"), outputs.get("num_cached_tokens")
    return Reply(
        text,
        token_ids,
        None if reason == _NOT_ENDED else reason[4:].decode(),
        logprobs,
        served_by,
        prompt_logprobs[4:] if prompt_logprobs else None,
        msgspec.json.decode(stop_reason[4:], type=str | int | None) if stop_reason else None,
        int.from_bytes(cached, "little") if cached else None,
        timings=timings,
    )
