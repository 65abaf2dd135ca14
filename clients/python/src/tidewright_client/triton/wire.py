"""Requests and responses as Triton's protocol has them. The only module that knows names of tensors.

The messages are those of the package `tritonclient`. Its client objects are not used: they pass each value through
numpy, and their streams lose the request id of an error.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import service_pb2

from tidewright_client.errors import InvalidRequest, UnexpectedAnswer
from tidewright_client.triton.pieces import Logprob, Piece, TokenLogprobs

MAX_REQUEST_BYTES = 64 << 20
MAX_TOKEN_ID = 2**31 - 1
MAX_OUTPUTS = 16  # of one prompt; the server's limit of `n`
_FINAL = "triton_final_response"
_ASKS_FOR_FINAL = "triton_enable_empty_final_response"
_TRACEPARENT = "traceparent"
_NOT_ENDED = "None"  # the finish_reason of a sequence that goes on
_LENGTH = struct.Struct("<I")

Inputs = list[tuple[str, str, list[int], bytes]]
"""Name, datatype, shape and contents of each tensor."""


def text_input(prompt: str) -> Inputs:
    return [("text_input", "BYTES", [1], _element(prompt, "prompt"))]


def messages_input(messages: Sequence[Mapping[str, Any]], shape: list[int]) -> Inputs:
    try:
        text = json.dumps(list(messages), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"messages can't be written as JSON: {error}", param="messages") from None
    return [("messages", "BYTES", shape, _element(text, "messages"))]


def ids_input(token_ids: Sequence[int]) -> Inputs:
    if not len(token_ids):
        raise InvalidRequest("input_ids is empty; give at least one token id", param="input_ids")
    try:
        raw = struct.pack(f"<{len(token_ids)}i", *token_ids)
    except struct.error:
        bad = next(one for one in token_ids if not (isinstance(one, int) and 0 <= one <= MAX_TOKEN_ID))
        raise InvalidRequest(f"input_ids has {bad!r}, which is no token id", param="input_ids") from None
    return [("input_ids", "INT32", [len(token_ids)], raw)]


def flag(*names: str) -> Inputs:
    return [(name, "BOOL", [1], b"\1") for name in names]


def sampling_input(sampling: Mapping[str, Any]) -> Inputs:
    try:
        text = json.dumps(sampling, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"the sampling parameters can't be written as JSON: {error}") from None
    return [("sampling_parameters", "BYTES", [1], _element(text, "the sampling parameters"))]


def control_input(word: str) -> Inputs:
    return [("control", "BYTES", [1], _element(word, "control"))]


def request_of(model: str, request_id: str, inputs: Inputs, traceparent: str = "") -> service_pb2.ModelInferRequest:
    """Raises InvalidRequest: it is larger than any request can be."""
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    request.parameters[_ASKS_FOR_FINAL].bool_param = True
    if traceparent:
        request.parameters[_TRACEPARENT].string_param = traceparent
    for name, datatype, shape, raw in inputs:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    if (size := request.ByteSize()) > MAX_REQUEST_BYTES:
        raise InvalidRequest(f"the request has {size} bytes, more than the limit of {MAX_REQUEST_BYTES}")
    return request


def _element(text: str, what: str) -> bytes:
    """Of a BYTES tensor."""
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise InvalidRequest(f"{what} is not valid Unicode: {error}") from None
    return _LENGTH.pack(len(raw)) + raw


@dataclass(frozen=True)
class Reply:
    """One response to one request."""

    request_id: str
    model: str
    num_bytes: int
    outputs: dict[str, bytes] = field(default_factory=dict)
    error: str = ""
    is_final: bool = False
    """Triton has nothing more to say of this request."""


def reply_of(response: service_pb2.ModelStreamInferResponse) -> Reply:
    inner, size = response.infer_response, response.ByteSize()
    if response.error_message:
        return Reply(inner.id, inner.model_name, size, error=response.error_message, is_final=True)
    return whole_reply(inner, size, inner.parameters[_FINAL].bool_param if _FINAL in inner.parameters else False)


def whole_reply(response: service_pb2.ModelInferResponse, size: int = 0, is_final: bool = True) -> Reply:
    names = (output.name for output in response.outputs)
    outputs = dict(zip(names, response.raw_output_contents, strict=False))
    return Reply(response.id, response.model_name, size, outputs, is_final=is_final)


class Reader:
    """Makes pieces of the replies to one request."""

    def __init__(self) -> None:
        self._served_by = ""
        self._ended: set[int] = set()

    def pieces(self, reply: Reply) -> list[Piece]:
        """Raises UnexpectedAnswer: it is no generation of Tidewright's."""
        try:
            return self._pieces(reply)
        except (KeyError, ValueError, IndexError, struct.error, TypeError, AttributeError) as error:
            raise UnexpectedAnswer(
                f"the response of the model {reply.model!r} can't be read ({error!r}); is it a Tidewright server of "
                "this client's version?",
                request_id=reply.request_id,
            ) from None

    def _pieces(self, reply: Reply) -> list[Piece]:
        outputs = reply.outputs
        texts, reasons = _texts(outputs["text_output"]), _texts(outputs["finish_reason"])
        ids = memoryview(outputs["output_ids"]).cast("i").tolist()
        if "served_by" in outputs:
            (self._served_by,) = _texts(outputs["served_by"])
        whole: dict[str, Any] = {
            "served_by": self._served_by or reply.model,
            "fallback_reason": _texts(outputs["fallback_reason"])[0] if "fallback_reason" in outputs else None,
            "num_prompt_tokens": _count(outputs, "num_input_tokens"),
            "num_cached_tokens": _count(outputs, "num_cached_tokens"),
        }
        if len(texts) == len(reasons) == 1 and len(outputs) == 3 + ("num_input_tokens" in outputs):  # most of a stream
            return [Piece(texts[0], ids, _reason(reasons[0]), **whole)]
        counts = _uints(outputs["num_output_tokens"]) if "num_output_tokens" in outputs else (len(ids),)
        if not len(texts) == len(reasons) == len(counts) <= MAX_OUTPUTS or sum(counts) != len(ids):
            raise ValueError("tensors that do not fit together")
        logprobs = [_logprobs(text) for text in _texts(outputs.get("logprobs", b""))]
        cumulative = struct.unpack(f"<{len(texts)}f", outputs["cumulative_logprob"]) if logprobs else ()
        stops = [json.loads(text) for text in _texts(outputs.get("stop_reason", b""))]
        prompt = _texts(outputs.get("prompt_logprobs", b""))
        pieces: list[Piece] = []
        begin = 0
        for index, (text, count) in enumerate(zip(texts, counts, strict=True)):
            own, begin = ids[begin : begin + count], begin + count
            reason = _reason(reasons[index])
            if index in self._ended or not (own or text or reason or len(texts) == 1):
                continue  # no news of this one
            if reason:
                self._ended.add(index)
            pieces.append(
                Piece(
                    text,
                    own,
                    reason,
                    index,
                    logprobs=logprobs[index] if logprobs else None,
                    cumulative_logprob=cumulative[index] if logprobs else None,
                    prompt_logprobs=_prompt_logprobs(prompt[0]) if prompt and not pieces else None,
                    stop_reason=stops[index] if stops else None,
                    **whole,
                )
            )
        return pieces


def embedding_of(reply: Reply) -> tuple[list[float], int]:
    """The vector, and the tokens of its prompt. Raises UnexpectedAnswer."""
    try:
        vector: list[float] = [*memoryview(reply.outputs["embedding"]).cast("f")]
        (count,) = _uints(reply.outputs["num_input_tokens"])
    except (KeyError, ValueError, TypeError, struct.error):
        raise UnexpectedAnswer(f"the model {reply.model!r} sent no embedding; is it a Tidewright server?") from None
    return vector, count


def ids_of(reply: Reply) -> list[int]:
    """Of the tokenizer. Raises UnexpectedAnswer."""
    try:
        ids: list[int] = memoryview(reply.outputs["input_ids"]).cast("i").tolist()
    except (KeyError, TypeError):
        raise UnexpectedAnswer(f"the model {reply.model!r} sent no token ids; is it a Tidewright server?") from None
    return ids


def text_of(reply: Reply) -> str:
    """Of an answer to a control word. Raises UnexpectedAnswer."""
    try:
        (text,) = _texts(reply.outputs["text_output"])
    except (KeyError, ValueError, struct.error):
        raise UnexpectedAnswer(f"the model {reply.model!r} sent no text; is it a Tidewright server?") from None
    return text


def _texts(raw: bytes) -> list[str]:
    """The elements of a BYTES tensor."""
    found, at = [], 0
    while at < len(raw):
        (length,) = _LENGTH.unpack_from(raw, at)
        at += 4 + length
        if at > len(raw):
            raise ValueError("a text that is cut off")
        found.append(raw[at - length : at].decode())
    return found


def _uints(raw: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(raw) // 4}I", raw)


def _count(outputs: Mapping[str, bytes], name: str) -> int | None:
    return _uints(outputs[name])[0] if name in outputs else None


def _reason(text: str) -> str | None:
    return None if text == _NOT_ENDED else text


def _logprobs(text: str) -> list[TokenLogprobs] | None:
    positions = json.loads(text)
    return None if positions is None else [_position(entries) for entries in positions]


def _prompt_logprobs(text: str) -> list[TokenLogprobs | None]:
    return [None if entries is None else _position(entries) for entries in json.loads(text)]


def _position(entries: Mapping[str, Mapping[str, Any]]) -> TokenLogprobs:
    return {
        int(token_id): Logprob(_number(entry["logprob"]), entry["rank"], entry["decoded_token"])
        for token_id, entry in entries.items()
    }


def _number(value: Any) -> float:
    return -math.inf if value is None else float(value)
