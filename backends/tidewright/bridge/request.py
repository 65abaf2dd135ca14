"""From input tensors to a validated request. Everything that can be refused is refused here, before it queues."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np

from tidewright.engine.grammar import GrammarError, check_grammar
from tidewright.engine.messages import Ready
from tidewright.errors import InvalidRequestError
from tidewright.schema import SamplingParams
from tidewright.tokenization import InvalidPromptError, Tokenizer

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_BAD_WORDS = 64
MAX_BAD_WORD_LENGTH = 64  # characters
MAX_LOGIT_BIASES = 300
MAX_N = 16
MAX_SALT_LENGTH = 256  # characters


@dataclass(frozen=True)
class OutputOptions:
    """Which optional output tensors the caller asked for."""

    finish_reason: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    logprobs: bool = False
    cumulative_logprob: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    prompt_token_ids: list[int]
    echo: str  # text put before the output: the prompt or nothing
    stream: bool
    sampling: SamplingParams
    returns: OutputOptions
    resume_ids: list[int] = field(default_factory=list)  # output that the caller has already
    bad_words_ids: list[list[int]] = field(default_factory=list)


def decode_text(value: object, name: str) -> str:
    """The text in one element of a BYTES tensor."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from None


def single(tensors: Mapping[str, np.ndarray], name: str) -> object | None:
    """The only element of an optional tensor, None if it was not sent."""
    tensor = tensors.get(name)
    if tensor is None:
        return None
    if tensor.size != 1:
        raise InvalidRequestError(f"{name} must hold exactly one element, got shape {list(tensor.shape)}")
    return tensor.reshape(-1)[0]


def parse_sampling(text: str | None, parameters: str) -> SamplingParams:
    """Sampling parameters from the JSON tensor and from Triton's request parameters, checked.

    Raises:
        InvalidRequestError: names the parameter that is unknown, out of range, or given twice.
    """
    fields: dict[str, object] = msgspec.json.decode(parameters, type=dict) if parameters else {}
    if text is not None:
        try:
            from_tensor = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"sampling_parameters is not JSON: {error}") from None
        if not isinstance(from_tensor, dict):
            raise InvalidRequestError('sampling_parameters must be a JSON object such as {"max_tokens": 64}')
        if twice := sorted(fields.keys() & from_tensor.keys()):
            raise InvalidRequestError(
                f"{', '.join(twice)} given both in sampling_parameters and as a request parameter; send one"
            )
        fields |= from_tensor
    if unknown := sorted(fields.keys() - set(SamplingParams.__struct_fields__)):
        known = ", ".join(SamplingParams.__struct_fields__)
        raise InvalidRequestError(f"unknown sampling parameter: {', '.join(unknown)}; known are {known}")
    try:
        return msgspec.convert(fields, SamplingParams, strict=False)
    except msgspec.ValidationError as error:
        if "`key` in `$.logit_bias`" in str(error):
            raise InvalidRequestError('logit_bias: the keys must be token ids, as in {"5": 1.0}') from None
        raise InvalidRequestError(f"sampling parameters: {error}".replace(" - at `$.", " for `")) from None


def with_max_tokens(sampling: SamplingParams, limit: int) -> SamplingParams:
    """No more than so many, and still valid."""
    if sampling.max_tokens <= limit:
        return sampling
    return msgspec.structs.replace(sampling, max_tokens=limit, min_tokens=min(sampling.min_tokens, limit))


def check_sampling(sampling: SamplingParams, engine: Ready) -> None:
    """What a type can't say: values that must agree with each other and with the model."""
    _check_numbers(sampling)
    if sampling.n > MAX_N:
        raise InvalidRequestError(f"n is {sampling.n}, more than the limit of {MAX_N}")
    if sampling.max_tokens > engine.max_model_len:
        raise InvalidRequestError(
            f"max_tokens is {sampling.max_tokens}, more than the model's context of {engine.max_model_len} tokens"
        )
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequestError(f"min_tokens is {sampling.min_tokens}, more than max_tokens, {sampling.max_tokens}")
    if len(sampling.stop_strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"{len(sampling.stop_strings)} stop strings, at most {MAX_STOP_STRINGS}")
    for text in sampling.stop_strings:
        if not 0 < len(text) <= MAX_STOP_LENGTH:
            raise InvalidRequestError(f"a stop string must have 1 to {MAX_STOP_LENGTH} characters")
    for token_id in sampling.stop_token_ids:
        if token_id >= engine.vocab_size:
            raise InvalidRequestError(f"stop_token_ids: {token_id} is outside the vocabulary of {engine.vocab_size}")
    biases = sampling.logit_bias or {}
    if len(biases) > MAX_LOGIT_BIASES:
        raise InvalidRequestError(f"logit_bias has {len(biases)} entries, at most {MAX_LOGIT_BIASES}")
    for token_id in biases:
        if not 0 <= token_id < engine.vocab_size:
            raise InvalidRequestError(f"logit_bias: {token_id} is outside the vocabulary of {engine.vocab_size}")
    if sampling.cache_salt is not None and not 0 < len(sampling.cache_salt) <= MAX_SALT_LENGTH:
        raise InvalidRequestError(f"cache_salt must have 1 to {MAX_SALT_LENGTH} characters")
    _check_guided(sampling)


def _to_resume(sampling: SamplingParams, resume_ids: list[int]) -> SamplingParams:
    if sampling.n > 1:
        raise InvalidRequestError(f"resume_ids are of one output, but n is {sampling.n}")
    if len(resume_ids) >= sampling.max_tokens:
        raise InvalidRequestError(
            f"there are {len(resume_ids)} resume_ids and max_tokens, which counts them, is {sampling.max_tokens}: "
            "nothing is left to generate"
        )
    # What the prompt's tokens are worth was told with the first of the output.
    return msgspec.structs.replace(sampling, prompt_logprobs=None)


def _check_numbers(sampling: SamplingParams) -> None:
    """NaN passes every range, and infinity those that are open."""
    numbers = msgspec.structs.asdict(sampling)
    numbers |= {f"logit_bias of {token_id}": bias for token_id, bias in (sampling.logit_bias or {}).items()}
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequestError(f"{name} must be a finite number, got {value}")


def _check_guided(sampling: SamplingParams) -> None:
    names = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
    given = [name for name in names if getattr(sampling, name) is not None]
    if not given:
        return
    if len(given) > 1:
        raise InvalidRequestError(f"{' and '.join(given)} given; an output can follow only one, send one")
    if sampling.ignore_eos:
        raise InvalidRequestError(
            f"ignore_eos with {given[0]}: a complete output can only be followed by EOS; drop one"
        )
    if sampling.min_tokens > 0:
        raise InvalidRequestError(f"min_tokens with {given[0]}: the output is complete when it is; drop one")
    try:
        check_grammar(sampling)
    except GrammarError as error:
        raise InvalidRequestError(str(error)) from None


def tokenize_bad_words(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each word as it stands at the start of a text, and as it stands after a space."""
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequestError(f"{len(words)} bad_words, at most {MAX_BAD_WORDS}")
    found: list[list[int]] = []
    for word in words:
        if not word.strip() or len(word) > MAX_BAD_WORD_LENGTH:
            raise InvalidRequestError(
                f"bad_words: each must have 1 to {MAX_BAD_WORD_LENGTH} characters, not only spaces"
            )
        for text in (word.lstrip(), " " + word.lstrip()):
            token_ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
            if token_ids and token_ids not in found:
                found.append(token_ids)
    return found


def check_prompt_length(prompt_token_ids: list[int], max_model_len: int) -> None:
    """A prompt must leave room for one token of output."""
    length = len(prompt_token_ids)
    if length >= max_model_len:
        raise InvalidRequestError(
            f"prompt has {length} tokens; with one token of output the model takes at most {max_model_len - 1}"
        )


def check_prompt(prompt_token_ids: list[int], resume_ids: list[int], sampling: SamplingParams, engine: Ready) -> None:
    """Length against the model's context and against the whole KV cache; ids against the vocabulary."""
    check_prompt_length(prompt_token_ids + resume_ids, engine.max_model_len)
    longest = min(len(prompt_token_ids) + sampling.max_tokens, engine.max_model_len)
    capacity = engine.num_blocks * engine.block_size
    if longest > capacity:
        raise InvalidRequestError(
            f"prompt and max_tokens come to {longest} tokens, but the KV cache holds {capacity}: "
            "lower max_tokens, or raise kv_cache_memory"
        )
    for name, ids in (("input_ids", prompt_token_ids), ("resume_ids", resume_ids)):
        if ids and (min(ids) < 0 or max(ids) >= engine.vocab_size):
            raise InvalidRequestError(
                f"{name}: each must be from 0 to {engine.vocab_size - 1}, got {min(ids)} to {max(ids)}"
            )


def parse_request(
    tensors: Mapping[str, np.ndarray], parameters: str, tokenizer: Tokenizer, engine: Ready
) -> GenerationRequest:
    """Check the input tensors and Triton's request parameters (JSON) and make a request of them.

    Raises:
        InvalidRequestError: with a message for the caller.
    """

    def flag(name: str, default: bool = False) -> bool:
        value = single(tensors, name)
        return default if value is None else bool(value)

    stream = flag("stream")
    exclude_input = flag("exclude_input_in_output", default=stream)
    if stream and not exclude_input:
        raise InvalidRequestError("exclude_input_in_output = false is not possible when streaming")
    returns = OutputOptions(
        finish_reason=flag("return_finish_reason"),
        num_input_tokens=flag("return_num_input_tokens"),
        num_output_tokens=flag("return_num_output_tokens"),
        logprobs=flag("return_logprobs"),
        cumulative_logprob=flag("return_cumulative_logprob"),
    )

    options = single(tensors, "sampling_parameters")
    sampling = parse_sampling(None if options is None else decode_text(options, "sampling_parameters"), parameters)
    resume_ids = tensors["resume_ids"].reshape(-1).tolist() if "resume_ids" in tensors else []
    if engine.max_output_tokens:
        sampling = with_max_tokens(sampling, min(len(resume_ids) + engine.max_output_tokens, engine.max_model_len))
    check_sampling(sampling, engine)
    if resume_ids:
        sampling = _to_resume(sampling, resume_ids)
    if sampling.seed is None:
        sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
    if (returns.logprobs or returns.cumulative_logprob) and sampling.logprobs is None:
        sampling = msgspec.structs.replace(sampling, logprobs=0)
    bad_words_ids = tokenize_bad_words(sampling.bad_words, tokenizer)

    text = single(tensors, "text_input")
    if (text is None) == ("input_ids" not in tensors):
        raise InvalidRequestError("send either text_input or input_ids" + (", not both" if text is not None else ""))
    if text is not None:
        prompt = decode_text(text, "text_input")
        try:
            prompt_token_ids = tokenizer.encode(prompt)
        except InvalidPromptError as error:
            raise InvalidRequestError(str(error)) from None
    else:
        prompt_token_ids = tensors["input_ids"].reshape(-1).tolist()
        if not prompt_token_ids:
            raise InvalidRequestError("input_ids is empty; send at least one token")
    check_prompt(prompt_token_ids, resume_ids, sampling, engine)
    if exclude_input or resume_ids:  # what is between the prompt and this output is not sent again either
        prompt = ""
    elif text is None:
        prompt = tokenizer.prompt_text(prompt_token_ids)
    return GenerationRequest(prompt_token_ids, prompt, stream, sampling, returns, resume_ids, bad_words_ids)
