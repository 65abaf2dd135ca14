"""What a caller asks for, checked, as the tensors of a request."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from tidewright_client import checks
from tidewright_client.errors import InvalidRequest
from tidewright_client.triton import wire

Messages = Sequence[Mapping[str, Any]]

FAILSAFE, DECODER, TOKENIZER = "failsafe", "decoder", "tokenizer"
_ENSEMBLES = {"generate": FAILSAFE, "generate_direct": DECODER}
_ID = re.compile(r"[^\x00-\x1f\x7f]{1,256}")
_ADDRESS = re.compile(r"[^\s/?#@]+:\d{1,5}")


class Sampling(TypedDict, total=False):
    """Sampling parameters; docs/api.md says what each means. `timeout` is an argument of the calls."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    bad_words: Sequence[str]
    allowed_token_ids: Sequence[int] | None
    guided_json: Mapping[str, Any] | str | None
    guided_regex: str | None
    guided_grammar: str | None
    guided_choice: Sequence[str] | None
    seed: int | None
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str] | None
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    n: int
    priority: int
    ttft_target: float | None
    tpot_target: float | None
    cache_salt: str | None
    tenant: str
    tenant_weight: int
    lora_name: str | None


@dataclass(frozen=True)
class Order:
    """One request, but for what depends on the moment that it is sent."""

    model: str
    request_id: str
    prompt: str | None
    messages: Messages | None
    input_ids: Sequence[int] | None
    sampling: Mapping[str, Any]
    streams: bool
    details: bool = False
    traceparent: str = ""

    @property
    def num_outputs(self) -> int:
        return int(self.sampling.get("n") or 1)

    def inputs(self, message_ids: Sequence[int] | None, timeout: float | None) -> wire.Inputs:
        """`message_ids`: the token ids of its messages. `timeout`: seconds that the server may take."""
        tensors: wire.Inputs = []
        if self.prompt is not None:
            tensors += wire.text_input(self.prompt)
        ids = self.input_ids if message_ids is None else message_ids
        if ids is not None:
            tensors += wire.ids_input(ids)
        if self.messages is not None and self.model == FAILSAFE:
            # For a fallback with another tokenizer.
            tensors += wire.messages_input(self.messages, [1])
        sampling = dict(self.sampling)
        if timeout is not None:
            sampling["timeout"] = timeout
        tensors += wire.sampling_input(sampling)
        flags = ["exclude_input_in_output", "return_finish_reason"]
        if self.input_ids is None:
            flags.append("return_num_input_tokens")
        if self.streams:
            flags.append("stream")
        if self.num_outputs > 1:
            flags.append("return_num_output_tokens")
        if sampling.get("logprobs") is not None:
            flags += ["return_logprobs", "return_cumulative_logprob"]
        if self.details:
            flags += ["return_stop_reason", "return_num_cached_tokens"]
        return tensors + wire.flag(*flags)


def order_of(
    prompt: str | None,
    messages: Messages | None,
    input_ids: Sequence[int] | None,
    model: str,
    request_id: str | None,
    sampling: Mapping[str, Any],
    *,
    streams: bool,
    details: bool,
    traceparent: str | None,
) -> Order:
    """Raises InvalidRequest."""
    given = {"prompt": prompt, "messages": messages, "input_ids": input_ids}
    if sum(value is not None for value in given.values()) != 1:
        raise InvalidRequest("give one of prompt, messages and input_ids")
    if prompt is not None and not isinstance(prompt, str):
        raise InvalidRequest("prompt must be a text; token ids go into input_ids", param="prompt")
    if messages is not None and (isinstance(messages, str) or not all(isinstance(one, Mapping) for one in messages)):
        raise InvalidRequest('messages must be a list like [{"role": "user", "content": "Hi"}]', param="messages")
    if "stream" in sampling:
        raise InvalidRequest("call stream() for a stream, and generate() for a whole answer", param="stream")
    number = sampling.get("n")
    if number is not None and (not isinstance(number, int) or not 1 <= number <= wire.MAX_OUTPUTS):
        raise InvalidRequest(f"n must be 1 to {wire.MAX_OUTPUTS}", param="n")
    for name, text in (("model", model), ("request_id", request_id), ("traceparent", traceparent)):
        checks.unicode(name, name, text or "")
    try:
        checks.json_values(sampling)
    except TypeError as error:
        raise InvalidRequest(str(error)) from None
    return Order(
        checked_model(model),
        checked_id(request_id),
        prompt,
        messages,
        input_ids,
        {name: value for name, value in sampling.items() if value is not None},
        streams,
        details,
        traceparent or "",
    )


def checked_model(model: str) -> str:
    if instead := _ENSEMBLES.get(model):
        raise InvalidRequest(
            f"{model} is an ensemble, through which Triton carries no cancel; ask {instead}: this client makes token "
            "ids of messages itself",
            param="model",
        )
    return model


def new_id() -> str:
    """Short, for each response carries it; and none can guess it, who could cancel by it."""
    return secrets.token_urlsafe(12)


def checked_id(request_id: str | None) -> str:
    if request_id is None:
        return new_id()
    if not _ID.fullmatch(request_id):
        raise InvalidRequest("request_id must have 1 to 256 characters, none of which controls", param="request_id")
    return request_id


def check_numbers(max_retries: int, timeout: float | None, idle_timeout: float | None, max_buffer_bytes: int) -> None:
    """Options of a client. Raises TypeError, ValueError."""
    checks.count("max_retries", max_retries, 0)
    checks.seconds("timeout", timeout)
    checks.seconds("idle_timeout", idle_timeout)
    checks.count("max_buffer_bytes", max_buffer_bytes, 1)


def checked_address(address: str) -> str:
    """HOST:PORT. Raises InvalidRequest, TypeError."""
    checks.kind("address", address, str, "a text")
    if not _ADDRESS.fullmatch(address):
        raise InvalidRequest(
            f"{address!r} is no address of Triton's gRPC port: write HOST:PORT, such as 127.0.0.1:8001, without a "
            "scheme or path; for TLS, give credentials"
        )
    return address


def checked_metadata(metadata: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """gRPC metadata of all calls. Raises InvalidRequest."""
    made = tuple((name.lower(), value) for name, value in (metadata or {}).items())
    if any(name == "triton_grpc_error" for name, _ in made):
        raise InvalidRequest(
            "the header triton_grpc_error ends a stream with its first error, and can crash Triton (2.51) while other "
            "requests are on it: leave it out"
        )
    return made
