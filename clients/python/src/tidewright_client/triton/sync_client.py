"""Triton over gRPC for programs with threads: all requests of a client share one stream."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc
from tritonclient.grpc import service_pb2

from tidewright_client import checks
from tidewright_client.deadline import Deadline
from tidewright_client.errors import InvalidRequest, TidewrightError, UnexpectedAnswer, read_once
from tidewright_client.hooks import Hooks
from tidewright_client.retries import Budget
from tidewright_client.triton import calls, wire
from tidewright_client.triton.calls import CHANNEL_OPTIONS, CLOSE_PATIENCE, INFER, MAX_BUFFER_BYTES, STREAM
from tidewright_client.triton.exchange import Exchange
from tidewright_client.triton.faults import of_rpc
from tidewright_client.triton.order import (
    DECODER,
    FAILSAFE,
    Messages,
    Order,
    check_numbers,
    checked_address,
    checked_metadata,
    checked_model,
    new_id,
    order_of,
)
from tidewright_client.triton.pieces import Embedding, Health, Piece, Status, TritonAnswer
from tidewright_client.triton.reading import Reading
from tidewright_client.triton.thread_carrier import Call, Carrier

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from tidewright_client.triton.order import Sampling


class TritonStream:
    """An answer as it comes. Closing or dropping it cancels the request. For one thread at a time."""

    def __init__(self, client: TritonClient, reading: Reading) -> None:
        self._client, self._reading = client, reading
        self._pieces: collections.deque[Piece] = collections.deque()
        self._call: Call | None = None
        self._is_closed = False

    @property
    def request_id(self) -> str:
        return self._reading.order.request_id

    def answer(self) -> TritonAnswer:
        """What came so far; after the end, the whole answer."""
        return self._reading.answer()

    def close(self) -> None:
        self._is_closed = True
        call, self._call = self._call, None
        if call and not self._reading.is_finished:
            call.leave()
        self._reading.ended()

    def __iter__(self) -> Self:
        """Raises InvalidRequest: it is over."""
        if self._is_closed and not self._pieces:
            raise read_once()
        return self

    def __next__(self) -> Piece:
        """Raises TidewrightError, once."""
        while not self._pieces:
            if self._is_closed or self._reading.is_finished:
                self.close()
                raise StopIteration
            self._pieces.extend(self._read())
        return self._pieces.popleft()

    def _read(self) -> list[Piece]:
        reading = self._reading
        try:
            if self._call is None:
                self._call = self._client._begin(reading)
            return reading.take(self._call.read(reading.deadline))
        except TidewrightError as error:
            call, self._call = self._call, None
            if call:
                call.leave()
            wait = reading.wait_after(error)
            if wait is None:
                self._is_closed = True
                raise reading.failed(error) from None
        time.sleep(wait)
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        call = getattr(self, "_call", None)
        if call and not self._reading.is_finished:
            call.drop()
            self._reading.ended()


class TritonClient:
    """One Triton. Its threads may be many: all requests go over one stream of one connection."""

    def __init__(
        self,
        address: str = "127.0.0.1:8001",
        *,
        timeout: float | None = 600.0,
        idle_timeout: float | None = 60.0,
        max_retries: int = 2,
        max_buffer_bytes: int = MAX_BUFFER_BYTES,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str] | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        """Connects with the first request.

        Args:
            address: HOST:PORT of Triton's gRPC port.
            timeout: seconds of a request, from its call to its last part.
            idle_timeout: seconds that may pass without a part.
            max_retries: of a request of which nothing came yet.
            max_buffer_bytes: what may wait for a slow reader, of each request; beyond it, the request is cancelled.
            credentials: for TLS.
            metadata: gRPC headers of all calls, such as the keys of restricted protocols.
            hooks: told of each generation; a header `traceparent` that one adds is the trace that it belongs to.

        Raises:
            InvalidRequest: the address is none.
            ValueError: a number is out of range.
        """
        check_numbers(max_retries, timeout, idle_timeout, max_buffer_bytes)
        self._address, self._metadata = checked_address(address), checked_metadata(metadata)
        self._timeout, self._idle_timeout, self._max_retries = timeout, idle_timeout, max_retries
        self._max_buffer, self._budget, self._hooks = max_buffer_bytes, Budget(), hooks or Hooks()
        self._lock = threading.Lock()
        self._current: Carrier | None = None
        self._is_closed = False
        if credentials is None:
            self._channel = grpc.insecure_channel(self._address, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(self._address, credentials, CHANNEL_OPTIONS)
        self._stream = self._channel.stream_stream(
            STREAM,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        self._infer = self._channel.unary_unary(
            INFER,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        input_ids: Sequence[int] | None = None,
        model: str = FAILSAFE,
        timeout: float | None = None,
        request_id: str | None = None,
        details: bool = False,
        traceparent: str | None = None,
        **sampling: Unpack[Sampling],
    ) -> TritonAnswer:
        """The whole answer to one of prompt, messages and input_ids.

        Args:
            model: `failsafe`, `decoder` or `fallback`.
            timeout: instead of the client's.
            request_id: by which `cancel` finds it; a random one otherwise.
            details: asks for stop_reason and num_cached_tokens.
            traceparent: W3C trace context that it belongs to.

        Raises:
            TidewrightError: there is none.
        """
        order = order_of(
            prompt,
            messages,
            input_ids,
            model,
            request_id,
            sampling,
            streams=False,
            details=details,
            traceparent=traceparent,
        )
        with self._stream_of(order, timeout) as stream:
            for _ in stream:
                pass
            return stream.answer()

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        input_ids: Sequence[int] | None = None,
        model: str = FAILSAFE,
        timeout: float | None = None,
        request_id: str | None = None,
        details: bool = False,
        traceparent: str | None = None,
        **sampling: Unpack[Sampling],
    ) -> TritonStream:
        """As `generate`, piece by piece. It is sent with the first read; closing it early cancels."""
        order = order_of(
            prompt,
            messages,
            input_ids,
            model,
            request_id,
            sampling,
            streams=True,
            details=details,
            traceparent=traceparent,
        )
        return self._stream_of(order, timeout)

    def embed(
        self,
        prompt: str | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> Embedding:
        """The prompt's vector, of a server with `--task embed`. Raises TidewrightError."""
        request_id, inputs = calls.embed_inputs(prompt, input_ids)
        reply = self._ask(DECODER, request_id, inputs, Deadline(self._or_own(timeout), time.monotonic))
        return Embedding(*wire.embedding_of(reply), request_id)

    def tokenize(
        self, prompt: str | None = None, *, messages: Messages | None = None, timeout: float | None = None
    ) -> list[int]:
        """The token ids of a text, or of messages in the model's chat template. Raises TidewrightError."""
        request = calls.tokenizer_request(prompt, messages)
        return self._tokens(request, Deadline(self._or_own(timeout), time.monotonic))

    def cancel(self, request_id: str, model: str = FAILSAFE, timeout: float = calls.CONTROL_TIMEOUT) -> bool:
        """Ends all requests of that id, whoever sent them; false if there was none."""
        try:
            self._control(f"cancel:{request_id}", model, timeout)
        except TidewrightError as error:
            if calls.NOT_IN_FLIGHT in error.message:
                return False
            raise
        return True

    def health(self, model: str = FAILSAFE, timeout: float = calls.CONTROL_TIMEOUT) -> Health:
        """Whether it takes requests, and why not; also if nothing answers at all."""
        try:
            self._control("health", model, timeout)
        except InvalidRequest:
            raise
        except TidewrightError as error:
            return Health(False, error.message)
        return Health(True)

    def status(self, model: str = DECODER, timeout: float = calls.CONTROL_TIMEOUT) -> Status:
        """How busy `decoder` or `fallback` is. Raises TidewrightError."""
        return calls.status_of(self._control("status", model, timeout))

    def close(self) -> None:
        """Cancels what runs, and disconnects."""
        with self._lock:
            self._is_closed = True
            carrier, self._current = self._current, None
            if carrier:
                carrier.line.close()
                for exchange in carrier.line.exchanges:
                    carrier.line.leave(exchange, time.monotonic())
                    exchange.fail(calls.closed())
        if carrier:
            carrier.signals.put(None)
            carrier.reader.join(CLOSE_PATIENCE)
            carrier.cancel()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Inside.

    def _or_own(self, timeout: float | None) -> float | None:
        checks.timeout_of_call(timeout, "None for the client's")
        return self._timeout if timeout is None else timeout

    def _stream_of(self, order: Order, timeout: float | None) -> TritonStream:
        self._budget.request()
        deadline = Deadline(self._or_own(timeout), time.monotonic)
        reading = Reading(order, deadline, self._max_retries, self._budget, self._hooks, self._address)
        return TritonStream(self, reading)

    def _begin(self, reading: Reading) -> Call:
        reading.begins()
        order, deadline = reading.order, reading.deadline
        ids = None
        if order.messages is not None:
            ids = self._tokens(calls.tokenizer_request(None, order.messages), deadline)
        inputs = order.inputs(ids, deadline.of_server())
        return self._send(order.model, order.request_id, inputs, reading.traceparent)

    def _send(self, model: str, request_id: str, inputs: wire.Inputs, traceparent: str = "") -> Call:
        request = wire.request_of(checked_model(model), request_id, inputs, traceparent)
        with self._lock:
            if self._is_closed:
                raise calls.closed()
            carrier = self._current
            if carrier is None or not carrier.line.takes_requests:
                carrier = self._current = Carrier(self._address, self._open, self._lock)
            if carrier.line.has(request_id):
                raise calls.taken(request_id)
            call = Call(carrier, self._lock, self._idle_timeout)
            call.exchange = Exchange(request_id, model, self._max_buffer, call.wake)
            carrier.line.begin(call.exchange, request, time.monotonic())
        carrier.signals.put(None)
        return call

    def _open(self, requests: Iterator[Any]) -> Any:
        return self._stream(requests, metadata=self._metadata)

    def _ask(self, model: str, request_id: str, inputs: wire.Inputs, deadline: Deadline) -> wire.Reply:
        """The only reply to a request."""
        call = self._send(model, request_id, inputs)
        try:
            reply = call.read(deadline)
        finally:
            call.leave()
        if reply is None:
            raise UnexpectedAnswer(f"Triton ended a request to {model!r} without an answer")
        return reply

    def _control(self, word: str, model: str, timeout: float) -> str:
        checks.timeout_of_call(timeout, "")
        deadline = Deadline(timeout, time.monotonic)
        return wire.text_of(self._ask(model, new_id(), wire.control_input(word), deadline))

    def _tokens(self, request: service_pb2.ModelInferRequest, deadline: Deadline) -> list[int]:
        try:
            response = self._infer(request, timeout=deadline.left(), metadata=self._metadata)
        except grpc.RpcError as error:
            raise of_rpc(self._address, error) from None
        return wire.ids_of(wire.whole_reply(response))
