"""The one place that names what crosses Triton: tensors and sampling parameters.

The config.pbtxt files, the bridge and the docs follow this module (a test holds them to it).
Names follow Triton's vLLM backend, so its clients work unchanged. It imports no other part.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import msgspec


@dataclass(frozen=True)
class TensorSpec:
    """A Triton tensor: `dtype` as config.pbtxt writes it, `dims` without the batch dimension."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool = False


def _flag(name: str) -> TensorSpec:
    return TensorSpec(name, "TYPE_BOOL", (1,), optional=True)


TEXT_INPUT = TensorSpec("text_input", "TYPE_STRING", (1,), optional=True)
INPUT_IDS = TensorSpec("input_ids", "TYPE_INT32", (-1,), optional=True)
MESSAGES = TensorSpec("messages", "TYPE_STRING", (1,), optional=True)

GENERATION_OPTIONS = (
    _flag("stream"),
    TensorSpec("sampling_parameters", "TYPE_STRING", (1,), optional=True),
    _flag("exclude_input_in_output"),
    _flag("return_finish_reason"),
    _flag("return_num_input_tokens"),
    _flag("return_num_output_tokens"),
    _flag("return_logprobs"),
    _flag("return_cumulative_logprob"),
    _flag("return_stop_reason"),
    _flag("return_num_cached_tokens"),
    _flag("return_timings"),
)

TOKENIZER_INPUTS = (TEXT_INPUT, MESSAGES)
TOKENIZER_OUTPUTS = (TensorSpec("input_ids", "TYPE_INT32", (-1,)),)

# Asks about the server instead of for text, and is answered at once, however much is queued.
CONTROL = TensorSpec("control", "TYPE_STRING", (1,), optional=True)
ControlWord = Literal["health", "drain", "status", "memory", "list_lora"]
DRAINING = "draining: no new requests are taken"  # the answer to "health" while that is so
# The answer to "health" begins so where only a reload of the model helps, with its process killed.
STUCK = "stuck: "
CONTROL_WORDS: tuple[str, ...] = get_args(ControlWord)
# Before a request id: ends the requests of that id, also where Triton carries no cancel, as through an ensemble.
CANCEL = "cancel:"
# Before a number of bytes: the KV cache is to have so many, while requests run.
RESIZE = "resize:"
# Before a number of bytes: of the memory that several models share, the KV cache may have so many. For `serve`.
LIMIT = "kv_limit:"
# Before an AdapterOrder in JSON: load and unload a LoRA adapter. Answered when that is done.
LOAD_LORA, UNLOAD_LORA = "load_lora:", "unload_lora:"
MAX_CONTROL_LENGTH = 8192  # characters
# Between a request id and a number: one attempt of `failsafe` at that request. A control character, so that no client's
# own id looks like one. "cancel:<request id>" ends all attempts, "cancel:<whole id>" only that one.
ATTEMPT = "\x1f"


def attempt_of(own_id: str, asked_for: str) -> bool:
    """Whether a request with the id `own_id` is meant by `asked_for`: its whole id, or that without the attempt."""
    return asked_for in (own_id, own_id.partition(ATTEMPT)[0])


# The last response of an attempt has a finish_reason, asked for or not. It is this one if the attempt failed, and
# text_output the error: as an error, Triton (2.51) loses it if it follows other responses.
FAILED = "failed"
# The error of a request that engines died over, one after the other. Another replica would lose its engines as well.
KILLS_ENGINES = "the engine died again and again over this request"


# The version of what gateway and replica say to each other: status, tensors of requests and responses, sampling
# parameters. It goes up by one when a gateway begins to need what older replicas lack, or a replica's answers get
# another meaning. What is only added, and asked for where the status says that it is known, does not change it
# (docs/upgrades.md).
PROTOCOL = 2
OLDEST_PROTOCOL = PROTOCOL - 1  # of a replica that this version's gateway works with

Protocol = Annotated[int, msgspec.Meta(ge=1)]


MAX_ADAPTER_NAME, MAX_ADAPTER_PATH = 128, 4096  # characters
# A letter or digit, then these: it is a model's name in URLs, and a part of NAME=PATH in lists with commas.
ADAPTER_NAME = "[A-Za-z0-9][A-Za-z0-9._:/@+-]*"
AdapterName = Annotated[str, msgspec.Meta(max_length=MAX_ADAPTER_NAME, pattern=rf"^{ADAPTER_NAME}\Z")]
NO_ADAPTER = "no adapter "  # how the error of a request begins whose adapter is not loaded
MAX_ADAPTERS_KNOWN = 256  # by name, of one server: those that are loaded, and those that were
MAX_CLOCK_LEAD = 3600.0  # seconds that a command may be ahead of the replica's clock; all before it lose to it


class AdapterOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What "load_lora:" and "unload_lora:" are about."""

    name: AdapterName
    path: Annotated[str, msgspec.Meta(max_length=MAX_ADAPTER_PATH)] = ""
    """To load: a folder that the server can read."""
    at: Annotated[float, msgspec.Meta(ge=0, le=1e12)] = 0.0
    """Unix time of the user's command, for AdapterStatus; 0: now. Not more than MAX_CLOCK_LEAD ahead."""


class AdapterStatus(msgspec.Struct, frozen=True):
    """What a server knows of a LoRA adapter's name."""

    name: str
    path: str
    loaded: bool
    """False: it was unloaded."""
    at: float = 0.0
    """Unix time of the command that made it so; 0: the server's own option `adapters`. The newest of all replicas says
    what is wanted."""


class StatusVersion(msgspec.Struct, frozen=True):
    """What can be read of every status, whatever else changes."""

    protocol: Protocol = 1
    """Versions before 2 did not say theirs."""


class DecoderStatus(msgspec.Struct, frozen=True):
    """The answer to "status", in JSON: can it work, and how much of it is there."""

    trouble: str
    """Why it can't take requests; empty if it can."""
    draining: bool
    silence: float
    """Seconds since the engine gave a sign of life; 0 without an engine."""
    waiting: float
    """Waiting requests, as a share of `max_waiting`."""
    wait: float
    """Seconds that the oldest request has been here that is not computed yet."""
    kv_usage: float
    """Share of the KV cache in use."""
    active: int = 0
    """Requests in flight."""
    max_model_len: int = 0
    """Longest prompt and output together, in tokens; 0 before the engine came up."""
    pid: int = 0
    """Of the process that answers: what another had is lost."""
    model: str = ""
    """The name of the model's folder."""
    tokenizer: str = ""
    """A hash of its vocabulary: token ids of another mean something else here."""
    max_running: int = 0
    """Sequences that are computed in one step, at most; 0 is unknown."""
    embedding_size: int = 0
    """Numbers in an embedding; 0: this server generates text."""
    tells_details: bool = False
    """It knows return_stop_reason and return_num_cached_tokens; older servers refuse them."""
    tells_timings: bool = False
    """It knows return_timings."""
    adapters: list[AdapterStatus] | None = None
    """LoRA adapters that are loaded, and those that were; None: this server serves none."""
    knows_tenants: bool = False
    """It knows the sampling parameters tenant and tenant_weight."""
    knows_targets: bool = False
    """It knows the sampling parameters ttft_target and tpot_target."""
    kv_tokens: int = 0
    """Tokens that its KV cache has room for now; 0 is unknown."""
    protocol: Protocol = 1
    """As in StatusVersion."""


class SequenceTimings(msgspec.Struct, frozen=True, omit_defaults=True):
    """When one sequence got how far, in seconds since the request's arrival. None: it did not get there."""

    sent: float | None = None
    """To the engine, the last time before its first token."""
    began: float | None = None
    """The first step that it was part of."""
    chunks: int = 0
    """Steps up to its first token."""
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had."""
    first_token: float | None = None
    ended: float | None = None
    tokens: int = 0
    events: list[tuple[Literal["preempted", "replayed"], float]] = []
    """Preempted by the scheduler; given to a further engine because one died."""


class Timings(msgspec.Struct, frozen=True, omit_defaults=True):
    """The output `timings`, in JSON: what a request's time went to in this server, for traces."""

    arrived: float
    """When the bridge got it, in seconds since 1970. All other times count from here."""
    validated: float
    ended: float
    triton_span: str = ""
    """The id of Triton's own span of this request, if Triton traced it in the caller's trace."""
    sequences: list[SequenceTimings] = []


# Tokens that another model, or this one before its death, has generated for the same request: it goes on behind them.
RESUME_IDS = TensorSpec("resume_ids", "TYPE_INT32", (-1,), optional=True)

# What a server does with its model: `tidewright serve --task`.
Task = Literal["generate", "embed"]
# How a prompt's hidden states become one vector.
Pooling = Literal["last", "mean"]
# Asks for the embedding of the prompt instead of text.
EMBED = _flag("embed")
EMBEDDING = TensorSpec("embedding", "TYPE_FP32", (-1,))

FALLBACK_INPUTS = (TEXT_INPUT, INPUT_IDS, RESUME_IDS, *GENERATION_OPTIONS, CONTROL)
GENERATION_OUTPUTS = (
    TensorSpec("text_output", "TYPE_STRING", (-1,)),
    TensorSpec("output_ids", "TYPE_INT32", (-1,)),
    TensorSpec("finish_reason", "TYPE_STRING", (-1,)),
    TensorSpec("num_input_tokens", "TYPE_UINT32", (1,)),
    TensorSpec("num_output_tokens", "TYPE_UINT32", (-1,)),
    TensorSpec("logprobs", "TYPE_STRING", (-1,)),
    TensorSpec("cumulative_logprob", "TYPE_FP32", (-1,)),
    TensorSpec("prompt_logprobs", "TYPE_STRING", (1,)),
    # Of a whole request, so each comes in one response only: a token costs nothing more.
    TensorSpec("stop_reason", "TYPE_STRING", (-1,)),
    TensorSpec("num_cached_tokens", "TYPE_UINT32", (1,)),
    TensorSpec("timings", "TYPE_STRING", (1,)),
)
DECODER_INPUTS = (*FALLBACK_INPUTS, EMBED)
DECODER_OUTPUTS = (*GENERATION_OUTPUTS, EMBEDDING)

# input_ids are the prompt; text or messages beside them say the same to a fallback with another tokenizer.
FAILSAFE_INPUTS = (TEXT_INPUT, MESSAGES, INPUT_IDS, *GENERATION_OPTIONS, CONTROL)
FAILSAFE_OUTPUTS = (
    *GENERATION_OUTPUTS,
    TensorSpec("served_by", "TYPE_STRING", (1,)),
    TensorSpec("fallback_reason", "TYPE_STRING", (1,)),
)

GENERATE_INPUTS = (TEXT_INPUT, MESSAGES, *GENERATION_OPTIONS)

# Why a request ended. Every request ends exactly once, with one of these.
FinishReason = Literal["stop", "length", "cancelled", "timeout", "overloaded", "invalid", "engine_failed"]
FINISH_REASONS: tuple[str, ...] = get_args(FinishReason)

MAX_LOGPROBS = 20
MAX_N = 16
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1
MAX_TOKENS = 2**31 - 1  # of any count of tokens, and of any token id: what an INT32 tensor holds
MAX_TIMEOUT = 1e9  # seconds; threads can't wait much longer
MAX_TARGET = 3600.0  # seconds of a latency target
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256  # length: in characters, as of all texts here
MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 1024
MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH = 64, 64
MAX_LOGIT_BIASES = 300
MAX_SALT_LENGTH = 256
MAX_TENANT_LENGTH = 320
MAX_WEIGHT = 1000
MAX_GRAMMAR_LENGTH = 65_536
MAX_CHOICES = 8192
MAX_PARAMETERS_LENGTH = 1 << 20  # of the JSON of all sampling parameters

TokenId = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Grammar = Annotated[str, msgspec.Meta(max_length=MAX_GRAMMAR_LENGTH)]
_StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
_Bias = Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How to choose the next token and when to stop. Names and defaults follow vLLM.

    Decoding with `msgspec.convert(..., strict=False)` validates types and ranges, names an unknown field,
    and accepts numbers written as strings, as clients of the vLLM backend send them. Every number, text and list has
    a bound, for it goes into msgpack and tensors. NaN is in no range.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] = 1.0
    """0 means greedy."""
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=MAX_TOKENS)] = -1
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches p."""
    min_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    """Drop tokens less likely than this share of the most likely one's probability."""
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)] = 1.0
    """Divides the positive logits, multiplies the negative ones, of tokens in prompt or output (CTRL)."""
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)] = 0.0
    """Subtracted from the logits of tokens that the output already has."""
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)] = 0.0
    """Subtracted from a token's logit for each time that the output already has it."""
    logit_bias: Annotated[dict[TokenId, _Bias], msgspec.Meta(max_length=MAX_LOGIT_BIASES)] | None = None
    """Added to the logits of token ids; in JSON the ids are strings."""
    bad_words: Annotated[
        list[Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_BAD_WORD_LENGTH)]],
        msgspec.Meta(max_length=MAX_BAD_WORDS),
    ] = []
    """Words that must not appear in the output, as the tokenizer writes each alone and after a space."""
    allowed_token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS)] | None = (
        None
    )
    """Only these are drawn; EOS too only if it is one of them."""
    guided_json: dict[str, Any] | _Grammar | None = None
    """A JSON schema that the output follows, as an object or as its text; kept as text, for msgpack carries no integer
    of more than 64 bits. At most one of the guided_… is given."""
    guided_regex: _Grammar | None = None
    """A regular expression that the whole output matches: Rust's syntax, with \\d, \\w and \\s in ASCII."""
    guided_grammar: _Grammar | None = None
    """A context-free grammar in Lark syntax."""
    guided_choice: Annotated[list[_Grammar], msgspec.Meta(max_length=MAX_CHOICES)] | None = None
    """The output is one of these."""
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """Same seed, same prompt: same tokens, whatever else is in the batch. Unset or -1: a random seed."""
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)] = 16
    min_tokens: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] = 0
    """EOS, stop token ids and stop strings are ignored before so many tokens."""
    stop: _StopString | Annotated[list[_StopString], msgspec.Meta(max_length=MAX_STOP_STRINGS)] | None = None
    """Strings that end the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string that ended the text, or the text of the token that did."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=MAX_STOP_TOKEN_IDS)] = []
    ignore_eos: bool = False
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """Log-probabilities of the chosen token and of so many most likely ones, for each position."""
    prompt_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    """The same for each prompt token but the first, which has none."""
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_N)] = 1
    """So many independent outputs of one prompt."""
    priority: Annotated[int, msgspec.Meta(ge=MIN_PRIORITY, le=MAX_PRIORITY)] = 0
    """Lower values run first, and are preempted last."""
    timeout: Annotated[float, msgspec.Meta(ge=0.0, le=MAX_TIMEOUT)] | None = None
    """Seconds from arrival after which the request ends with `timeout`, with the tokens it has."""
    ttft_target: Annotated[float, msgspec.Meta(gt=0.0, le=MAX_TARGET)] | None = None
    """Seconds to the first token, instead of the server's `ttft_target`."""
    tpot_target: Annotated[float, msgspec.Meta(gt=0.0, le=MAX_TARGET)] | None = None
    """Seconds between two tokens, instead of the server's `tpot_target`; a stricter one counts, but changes no step."""
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_SALT_LENGTH)] | None = None
    """Only requests with the same salt share prefixes in the KV cache; keeps tenants apart."""
    tenant: Annotated[str, msgspec.Meta(max_length=MAX_TENANT_LENGTH)] = ""
    """Whose request it is: of one priority, tenants get service in proportion to their weights, and cached prefixes are
    their own. The gateway names the API key; what its callers name counts for nothing."""
    tenant_weight: Annotated[int, msgspec.Meta(ge=1, le=MAX_WEIGHT)] = 1
    """Share of service of `tenant`, in proportion to that of others."""
    lora_name: AdapterName | None = None
    """The LoRA adapter that answers; None: the base model."""

    def __post_init__(self) -> None:
        """Raises ValueError, which msgspec makes a ValidationError of."""
        if isinstance(self.guided_json, dict):
            msgspec.structs.force_setattr(self, "guided_json", _schema_text(self.guided_json))
        if self.seed == -1:
            msgspec.structs.force_setattr(self, "seed", None)

    @property
    def guided(self) -> bool:
        choices = (self.guided_json, self.guided_regex, self.guided_grammar, self.guided_choice)
        return any(choice is not None for choice in choices)

    @property
    def needs_history(self) -> bool:
        """The choice of a token depends on which tokens came before."""
        return self.has_penalties or bool(self.bad_words) or self.guided

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


# How the message of a refusal for load ends that says when there is room: whole seconds, from 1 to an hour.
EXPECTED_WAIT = re.compile(r"; try again in (\d{1,4}) s$")
LONGEST_WAIT = 3600.0


def expected_wait(seconds: float) -> str:
    """As EXPECTED_WAIT finds it."""
    return f"; try again in {math.ceil(min(max(seconds, 1.0), LONGEST_WAIT))} s"


def _schema_text(schema: dict[str, Any]) -> str:
    try:
        text = json.dumps(schema, allow_nan=False)
    except RecursionError:
        raise ValueError("guided_json has too many objects or lists within each other") from None
    except ValueError as error:  # NaN, infinity, or an integer too long to be written
        raise ValueError(f"guided_json is not JSON: {error}") from None
    if len(text) > MAX_GRAMMAR_LENGTH:
        raise ValueError(f"guided_json has {len(text)} characters, more than the limit of {MAX_GRAMMAR_LENGTH}")
    return text
