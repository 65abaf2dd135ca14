"""What the two clients of Triton have in common, beside what is said to the models."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tritonclient.grpc import service_pb2

from tidewright_client.errors import InvalidRequest, TidewrightError, UnexpectedAnswer
from tidewright_client.triton import wire
from tidewright_client.triton.order import TOKENIZER, Messages, new_id
from tidewright_client.triton.pieces import Status

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
INFER = "/inference.GRPCInferenceService/ModelInfer"
MAX_ANSWER_BYTES = 64 << 20
MAX_BUFFER_BYTES = 4 << 20
CONTROL_TIMEOUT = 10.0  # seconds
CLOSE_PATIENCE = 5.0  # seconds that what was cancelled may take to end
NOT_IN_FLIGHT = "no request with the id"  # the server's answer to a cancel

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),  # requests are checked before
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    # A connection for each client; by default, clients of one address share one.
    ("grpc.use_local_subchannel_pool", 1),
    # No keepalive: Triton takes pings without data for an attack, and ends all streams of the connection.
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def tokenizer_request(prompt: str | None, messages: Messages | None) -> service_pb2.ModelInferRequest:
    if (prompt is None) == (messages is None):
        raise InvalidRequest("give one of prompt and messages")
    if messages is not None:
        inputs = wire.messages_input(messages, [1, 1])
    else:
        inputs = [(name, kind, [1, 1], raw) for name, kind, _, raw in wire.text_input(prompt or "")]
    return wire.request_of(TOKENIZER, new_id(), inputs)


def embed_inputs(prompt: str | None, input_ids: Sequence[int] | None) -> tuple[str, wire.Inputs]:
    if (prompt is None) == (input_ids is None):
        raise InvalidRequest("give one of prompt and input_ids")
    given = wire.text_input(prompt) if prompt is not None else wire.ids_input(input_ids or [])
    return new_id(), given + wire.flag("embed", "return_num_input_tokens")


def status_of(text: str) -> Status:
    """Raises UnexpectedAnswer."""
    try:
        told = json.loads(text)
        known = {name: told[name] for name in Status.__dataclass_fields__ if name in told and name != "fields"}
        return Status(**known, fields=told)
    except (ValueError, TypeError):
        raise UnexpectedAnswer(f"no status of a Tidewright server: {text[:200]!r}") from None


def closed() -> TidewrightError:
    return InvalidRequest("the client is closed")


def taken(request_id: str) -> TidewrightError:
    return InvalidRequest(f"a request with the id {request_id!r} is in flight already", param="request_id")
