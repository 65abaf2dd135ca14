"""Sampling parameters of a request: read from JSON, and checked against each other and the model."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from tidewright.engine.messages import Ready
from tidewright.errors import InvalidRequestError
from tidewright.sampling.grammar import GrammarError, check_grammar
from tidewright.schema import MAX_PARAMETERS_LENGTH, SamplingParams, TokenId
from tidewright.tokenization import Tokenizer
from tidewright.tracing.trace_context import PARAMETER

_LORA_NAME = "lora_name"
# vLLM's newer name of guided_…, as one object.
_STRUCTURED = {"json": "guided_json", "regex": "guided_regex", "choice": "guided_choice", "grammar": "guided_grammar"}


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


def check_bad_words(sampling: SamplingParams, bad_words_ids: list[list[int]]) -> None:
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
