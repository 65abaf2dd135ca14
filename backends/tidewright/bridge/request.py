"""From input tensors to a validated request. Everything that can be refused is refused here, before it queues."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from tidewright.bridge.sampling_parameters import (
    check_bad_words,
    check_sampling,
    parse_sampling,
    tokenize_bad_words,
    with_max_tokens,
)
from tidewright.bridge.tensors import decode_text, single, token_ids
from tidewright.engine.messages import Ready
from tidewright.errors import InvalidRequestError
from tidewright.schema import EMBED, SamplingParams
from tidewright.tokenization import InvalidPromptError, Tokenizer


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
        ids = token_ids(tensors, "input_ids", max_model_len)
        if not ids:
            raise InvalidRequestError("input_ids is empty; send at least one token")
        return None, ids
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
    resume_ids = token_ids(tensors, "resume_ids", engine.max_model_len)
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
    check_bad_words(sampling, bad_words_ids)

    text, prompt_token_ids = _prompt(tensors, tokenizer, engine.max_model_len)
    check_prompt(prompt_token_ids, resume_ids, sampling, engine)
    if embeds or exclude_input or resume_ids:  # what is between prompt and this output is not sent again either
        echo = ""
    else:
        echo = tokenizer.prompt_text(prompt_token_ids) if text is None else text
    return GenerationRequest(prompt_token_ids, echo, stream, sampling, returns, resume_ids, bad_words_ids)
