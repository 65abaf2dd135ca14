"""What a guided request asks for, as a grammar for llguidance; both bridge and engine use it, so no torch here."""

from __future__ import annotations

import functools
import json

import llguidance

from tidewright.sampling import schema_numbers
from tidewright.schema import MAX_GRAMMAR_LENGTH, SamplingParams

_MAX_ERROR = 500  # characters
# Building a request's automaton takes processor time from the engine. This is 0.1 s or so, and enough for a JSON schema
# of 300 fields.
_LIMITS = llguidance.LLParserLimits(initial_lexer_fuel=100_000, verbose_errors=False)


class GrammarError(ValueError):
    """A grammar that can't be followed; the message is for the caller."""


def make_matcher(params: SamplingParams, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """A matcher at the start of the output.

    Raises:
        GrammarError: the grammar is wrong, or too large.
    """
    try:
        grammar = _grammar(params)
        matcher = llguidance.LLMatcher(tokenizer, grammar, limits=_LIMITS, log_level=0)
    except RecursionError:
        raise GrammarError("it has too many parts within each other") from None
    except ValueError as error:  # llguidance's, of what it can't read: nested too deeply, a number out of range, …
        raise GrammarError(_one_line(str(error))) from None
    check_matcher(matcher)
    return matcher


def check_matcher(matcher: llguidance.LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(_one_line(matcher.get_error()))


def _one_line(message: str) -> str:
    """An error of llguidance, which may quote the whole grammar."""
    text = " ".join(message.removesuffix("<non-verbose/>").split())
    return text if len(text) <= _MAX_ERROR else f"{text[:_MAX_ERROR]}…"


def check_grammar(params: SamplingParams) -> None:
    """Makes sure that the output of a guided request can at least begin.

    Raises:
        GrammarError: it can't; the message begins with the parameter's name.
    """
    name = next(n for n in ("json", "regex", "grammar", "choice") if getattr(params, f"guided_{n}") is not None)
    try:
        matcher = make_matcher(params, _byte_tokenizer())
        matcher.compute_bitmask()
        check_matcher(matcher)
    except GrammarError as error:
        reason = "no text can match it" if "NoExtension" in str(error) else str(error)
        raise GrammarError(f"guided_{name}: {reason}") from None


def _grammar(params: SamplingParams) -> str:
    if params.guided_json is not None:
        assert isinstance(params.guided_json, str)  # SamplingParams writes an object as text
        text = params.guided_json
        _check_length(text)
        try:
            schema = json.loads(text, parse_constant=_refuse_constant)
        except ValueError as error:
            raise GrammarError(f"the schema is not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise GrammarError('the schema must be a JSON object, such as {"type": "object"}')
        if (made := schema_numbers.kept(schema)) != schema:
            text = json.dumps(made, ensure_ascii=False)
        # One line, as Python's json.dumps writes it: free white space lets a small model write nothing else.
        return llguidance.LLMatcher.grammar_from_json_schema(
            text, defaults={"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
        )
    if params.guided_regex is not None:
        _check_length(params.guided_regex)
        # \d, \w and \s are ASCII. Lark reads // as a comment.
        pattern = llguidance.regex_to_lark(params.guided_regex, use_ascii="dws")
        return llguidance.LLMatcher.grammar_from_lark(f"start: /{pattern}/" if pattern else 'start: ""')
    if params.guided_grammar is not None:
        _check_length(params.guided_grammar)
        return llguidance.LLMatcher.grammar_from_lark(schema_numbers.kept_in_lark(params.guided_grammar))
    if not params.guided_choice:
        raise GrammarError("the list is empty; give at least one choice")
    # A Lark string is a JSON string, but Lark wants the character DEL escaped and no surrogates.
    choices = [json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in params.guided_choice]
    lark = "start: " + " | ".join(choices)
    _check_length(lark)
    return llguidance.LLMatcher.grammar_from_lark(lark)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_length(text: str) -> None:
    if len(text) > MAX_GRAMMAR_LENGTH:
        raise GrammarError(f"it has {len(text)} characters, more than the limit of {MAX_GRAMMAR_LENGTH}")


class _Bytes:
    """A vocabulary of the 256 bytes and an end: enough to try a grammar, and made in no time."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [bytes([value]) for value in range(256)] + [b"\xff<end>"]
    special_token_ids = [256]  # noqa: RUF012 - llguidance reads it so

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@functools.cache
def _byte_tokenizer() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), slices=[])
