"""From input tensors to a validated request. Everything that can be refused is refused here, before it queues."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from tidewright.engine.messages import Ready
from tidewright.errors import InvalidRequestError
from tidewright.sampling.grammar import GrammarError, check_grammar
from tidewright.schema import EMBED, MAX_PARAMETERS_LENGTH, SamplingParams, TokenId
from tidewright.tokenization import InvalidPromptError, Tokenizer
from tidewright.tracing.trace_context import PARAMETER

_LORA_NAME = "lora_name"
# vLLM's newer name of guided_…, as one object.
_STRUCTURED = {"json": "guided_json", "regex": "guided_regex", "choice": "guided_choice", "grammar": "guided_grammar"}


@dataclass(frozen=True)
class OutputOptions:
    """Which optional output tensors the caller asked for."""

    finish_reason: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    logprobs: bool = False
    cumulative_logprob: bool = False
    stop_reason: bool = False
    num_cached_tokens: bool = False
    timings: bool = False
    null_logprobs: bool = False  # `logprobs` without the sampling parameter of that name: null, as of the vLLM backend


@dataclass(frozen=True)
class GenerationRequest:
    prompt_token_ids: list[int]
    echo: str  # text put before the output: the prompt or nothing
    stream: bool
    sampling: SamplingParams
    returns: OutputOptions
    resume_ids: list[int] = field(default_factory=list)  # output that the caller has already
    bad_words_ids: list[list[int]] = field(default_factory=list)

    @property
    def adapter(self) -> str:
        """Name of the LoRA adapter; empty: the base model."""
        return self.sampling.lora_name or ""


# What an embedding request may have beside its prompt; the rest is about generated text.
_EMBEDDING_PARAMETERS = ("priority", "timeout", "cache_salt", "tenant", "tenant_weight", "lora_name")
_NOT_FOR_EMBEDDINGS = (
    "stream",
    "exclude_input_in_output",
    "return_num_output_tokens",
    "return_logprobs",
    "return_cumulative_logprob",
)


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
    """Sampling parameters from the JSON tensor or, without it, from Triton's request parameters, checked.

    As in Triton's vLLM backend, whose clients send both, the tensor wins.

    Raises:
        InvalidRequestError: names the parameter that is unknown or out of range.
    """
    fields = _sampling_fields(text, parameters)
    _rename_structured_outputs(fields)
    if unknown := sorted(fields.keys() - set(SamplingParams.__struct_fields__)):
        known = ", ".join(SamplingParams.__struct_fields__)
        raise InvalidRequestError(f"unknown sampling parameter: {', '.join(unknown)[:200]}; known are {known}")
    try:
        return msgspec.convert(fields, SamplingParams, strict=False)
    except msgspec.ValidationError as error:
        if "`key` in `$.logit_bias`" in str(error):
            wrong = next(key for key in fields["logit_bias"] if not _is_token_id(key))
            raise InvalidRequestError(
                f'logit_bias: the key {wrong[:50]!r} is no token id; send ids as in {{"5": 1.0}}'
            ) from None
        raise InvalidRequestError(f"sampling parameters: {error}".replace(" - at `$.", " for `")) from None
    except RecursionError:
        raise _too_nested() from None


def _sampling_fields(text: str | None, parameters: str) -> dict[str, Any]:
    name = "the request's parameters" if text is None else "sampling_parameters"
    source = parameters or "{}" if text is None else text
    if len(source) > MAX_PARAMETERS_LENGTH:
        raise InvalidRequestError(f"{name}: {len(source)} characters, more than the limit of {MAX_PARAMETERS_LENGTH}")
    try:
        # Triton writes a request parameter that is NaN as such.
        fields = msgspec.json.decode(source) if text is not None else json.loads(source)
    except RecursionError:
        raise _too_nested() from None
    except ValueError as error:
        raise InvalidRequestError(f"{name}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError('sampling_parameters must be a JSON object such as {"max_tokens": 64}')
    if text is None:
        fields.pop(PARAMETER, None)  # of the trace
    elif _LORA_NAME in parameters and _LORA_NAME not in fields:
        # Beside the tensor, request parameters count for nothing; but the base model must not answer for an adapter.
        fields[_LORA_NAME] = json.loads(parameters).get(_LORA_NAME)
    return fields


def _rename_structured_outputs(fields: dict[str, Any]) -> None:
    given = fields.pop("structured_outputs", None)
    if given is None:
        return
    kinds = {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else {}
    if not kinds or kinds.keys() - _STRUCTURED.keys():
        raise InvalidRequestError(
            f'structured_outputs must be an object with one of {", ".join(_STRUCTURED)}, as in {{"choice": ["a", "b"]}}'
        )
    for kind, value in kinds.items():
        if _STRUCTURED[kind] in fields:
            raise InvalidRequestError(f"{_STRUCTURED[kind]} and structured_outputs given; send one")
        fields[_STRUCTURED[kind]] = value


def _is_token_id(key: str) -> bool:
    try:
        msgspec.convert(key, TokenId, strict=False)
    except msgspec.ValidationError:
        return False
    return True


def _too_nested() -> InvalidRequestError:
    return InvalidRequestError("sampling parameters: too many objects or lists within each other")


def with_max_tokens(sampling: SamplingParams, limit: int) -> SamplingParams:
    """No more than so many, and still valid."""
    if sampling.max_tokens <= limit:
        return sampling
    return msgspec.structs.replace(sampling, max_tokens=limit, min_tokens=min(sampling.min_tokens, limit))


def check_sampling(sampling: SamplingParams, engine: Ready) -> None:
    """What a type can't say: values that must agree with each other and with the model."""
    if sampling.max_tokens > engine.max_model_len:
        raise InvalidRequestError(
            f"max_tokens is {sampling.max_tokens}, more than the model's context of {engine.max_model_len} tokens"
        )
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequestError(f"min_tokens is {sampling.min_tokens}, more than max_tokens, {sampling.max_tokens}")
    for token_id in sampling.stop_token_ids:
        if token_id >= engine.vocab_size:
            raise InvalidRequestError(f"stop_token_ids: {token_id} is outside the vocabulary of {engine.vocab_size}")
    for token_id in sampling.logit_bias or {}:
        if token_id >= engine.vocab_size:
            raise InvalidRequestError(f"logit_bias: {token_id} is outside the vocabulary of {engine.vocab_size}")
    _check_allowed(sampling, engine)
    _check_guided(sampling)


def _to_resume(sampling: SamplingParams, resume_ids: list[int]) -> SamplingParams:
    if sampling.n > 1:
        raise InvalidRequestError(f"resume_ids are of one output, but n is {sampling.n}")
    if len(resume_ids) >= sampling.max_tokens:
        raise InvalidRequestError(
            f"there are {len(resume_ids)} resume_ids and max_tokens, which counts them, is {sampling.max_tokens}: "
            "nothing is left to generate"
        )
    # What is told of the prompt came with the first tokens of the output.
    return msgspec.structs.replace(sampling, prompt_logprobs=None)


def _check_allowed(sampling: SamplingParams, engine: Ready) -> None:
    if sampling.allowed_token_ids is None:
        return
    allowed = set(sampling.allowed_token_ids)
    if max(allowed) >= engine.vocab_size:
        raise InvalidRequestError(f"allowed_token_ids: {max(allowed)} is outside the vocabulary of {engine.vocab_size}")
    if sampling.guided and allowed.isdisjoint(engine.eos_ids):
        raise InvalidRequestError(
            f"allowed_token_ids with {_guided_names(sampling)[0]}: a complete output can only be followed by EOS; "
            f"add an id of it ({', '.join(map(str, engine.eos_ids))}), or drop one"
        )
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else engine.eos_ids)}
    if sampling.min_tokens > 0 and allowed <= ends:
        raise InvalidRequestError(
            "min_tokens with allowed_token_ids that all end the output: no token can be drawn before; drop one"
        )


def _check_bad_words(sampling: SamplingParams, bad_words_ids: list[list[int]]) -> None:
    words_of_one = {word[0] for word in bad_words_ids if len(word) == 1}
    if sampling.allowed_token_ids and words_of_one.issuperset(sampling.allowed_token_ids):
        raise InvalidRequestError("all of allowed_token_ids are bad_words: no token can be drawn; drop one")


def _guided_names(sampling: SamplingParams) -> list[str]:
    names = ("guided_json", "guided_regex", "guided_grammar", "guided_choice")
    return [name for name in names if getattr(sampling, name) is not None]


def _check_guided(sampling: SamplingParams) -> None:
    given = _guided_names(sampling)
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
    found: list[list[int]] = []
    for word in words:
        if not word.strip():
            raise InvalidRequestError("bad_words: each must have more than spaces")
        for text in (word.lstrip(), " " + word.lstrip()):
            token_ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
            if token_ids and token_ids not in found:
                found.append(token_ids)
    return found


def _token_ids(tensors: Mapping[str, np.ndarray], name: str, max_model_len: int) -> list[int]:
    """Empty without such a tensor. One too long for the model is refused before it becomes a list."""
    ids = tensors.get(name)
    if ids is None:
        return []
    if ids.size > max_model_len:
        raise InvalidRequestError(f"{name} has {ids.size} tokens, more than the model's context of {max_model_len}")
    return list(ids.reshape(-1).tolist())


def check_prompt_length(prompt_token_ids: list[int], max_model_len: int) -> None:
    """A prompt must leave room for one token of output."""
    length = len(prompt_token_ids)
    if length >= max_model_len:
        raise InvalidRequestError(
            f"prompt has {length} tokens; with one token of output the model takes at most {max_model_len - 1}"
        )


def check_prompt(prompt_token_ids: list[int], resume_ids: list[int], sampling: SamplingParams, engine: Ready) -> None:
    """Length against the model's context and against the whole KV cache; ids against the vocabulary."""
    if engine.embedding_size:
        longest = len(prompt_token_ids)
        if longest > engine.max_model_len:
            raise InvalidRequestError(f"prompt has {longest} tokens; the model takes at most {engine.max_model_len}")
    else:
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


def _check_task(embeds: bool, engine: Ready) -> None:
    """Raises InvalidRequestError: the server has another task than the request."""
    if embeds and not engine.embedding_size:
        raise InvalidRequestError("this server generates text; embeddings need one that runs with --task embed")
    if engine.embedding_size and not embeds:
        raise InvalidRequestError(
            "this server runs with --task embed and generates no text; send embed = true for the prompt's embedding"
        )


def _check_embedding(tensors: Mapping[str, np.ndarray], sampling: SamplingParams) -> None:
    """Raises InvalidRequestError: it asks for what only generated text has."""
    names = [name for name in _NOT_FOR_EMBEDDINGS if single(tensors, name)]
    names += ["resume_ids"] if "resume_ids" in tensors else []
    defaults = SamplingParams()
    names += [
        name
        for name in SamplingParams.__struct_fields__
        if name not in _EMBEDDING_PARAMETERS and getattr(sampling, name) != getattr(defaults, name)
    ]
    if names:
        raise InvalidRequestError(
            f"{', '.join(names)}: an embedding has no generated text; beside its prompt it takes "
            f"{', '.join(_EMBEDDING_PARAMETERS)}"
        )


def _prompt(
    tensors: Mapping[str, np.ndarray], tokenizer: Tokenizer, max_model_len: int
) -> tuple[str | None, list[int]]:
    """The prompt's text, None if it was sent as ids, and its ids."""
    text = single(tensors, "text_input")
    if (text is None) == ("input_ids" not in tensors):
        raise InvalidRequestError("send either text_input or input_ids" + (", not both" if text is not None else ""))
    if text is None:
        token_ids = _token_ids(tensors, "input_ids", max_model_len)
        if not token_ids:
            raise InvalidRequestError("input_ids is empty; send at least one token")
        return None, token_ids
    prompt = decode_text(text, "text_input")
    try:
        return prompt, tokenizer.encode(prompt, max_model_len)
    except InvalidPromptError as error:
        raise InvalidRequestError(str(error)) from None


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

    embeds = flag(EMBED.name)
    _check_task(embeds, engine)
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
        stop_reason=flag("return_stop_reason"),
        num_cached_tokens=flag("return_num_cached_tokens"),
        timings=flag("return_timings"),
    )

    options = single(tensors, "sampling_parameters")
    sampling = parse_sampling(None if options is None else decode_text(options, "sampling_parameters"), parameters)
    resume_ids = _token_ids(tensors, "resume_ids", engine.max_model_len)
    if engine.max_output_tokens:
        sampling = with_max_tokens(sampling, min(len(resume_ids) + engine.max_output_tokens, engine.max_model_len))
    if embeds:
        _check_embedding(tensors, sampling)
    else:
        check_sampling(sampling, engine)
    if resume_ids:
        sampling = _to_resume(sampling, resume_ids)
        returns = replace(returns, num_cached_tokens=False)
    # Of n outputs each further one has the next seed, so the range is a circle.
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63
    sampling = msgspec.structs.replace(sampling, seed=seed)
    if sampling.logprobs is None:
        returns = replace(returns, null_logprobs=True)
        if returns.cumulative_logprob:
            sampling = msgspec.structs.replace(sampling, logprobs=0)
    bad_words_ids = tokenize_bad_words(sampling.bad_words, tokenizer)
    _check_bad_words(sampling, bad_words_ids)

    text, prompt_token_ids = _prompt(tensors, tokenizer, engine.max_model_len)
    check_prompt(prompt_token_ids, resume_ids, sampling, engine)
    if embeds or exclude_input or resume_ids:  # what is between prompt and this output is not sent again either
        echo = ""
    else:
        echo = tokenizer.prompt_text(prompt_token_ids) if text is None else text
    return GenerationRequest(prompt_token_ids, echo, stream, sampling, returns, resume_ids, bad_words_ids)
