"""Sampling parameters that no honest client sends: each is refused as the caller's mistake, by name, at once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.requests import ENGINE, tensors
from tidewright.bridge.request import GenerationRequest, parse_request
from tidewright.bridge.sampling_parameters import parse_sampling
from tidewright.errors import InvalidRequestError
from tidewright.schema import MAX_PARAMETERS_LENGTH
from tidewright.tokenization import Tokenizer


def parse(tokenizer: Tokenizer, parameters: str = "{}", **values: Any) -> GenerationRequest:
    return parse_request(tensors(text_input="a", **values), parameters, tokenizer, ENGINE)


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        made = {"type": "object", "properties": {"a": made}, "required": ["a"]}
    return made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "too many objects or lists within each other"),
        ('{"a":' * 5000, "too many objects or lists within each other"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "too many objects or lists within each other"),
        ('{"top_k": 1' + "0" * 5000 + "}", "not JSON"),
        ('{"temperature": NaN}', "not JSON"),
        ('{"temperature": 1e999}', "not JSON"),
        ('{"timeout": Infinity}', "not JSON"),
        ('{"guided_json": {"const": NaN}}', "not JSON"),
        ('{"logit_bias": {"1.5": 1}}', "logit_bias: the key '1.5' is no token id"),
        ('{"logit_bias": {"5": 1, "99999999999999999999": 1}}', "the key '99999999999999999999' is no token id"),
        (json.dumps({"x" * 10_000: 1}), "unknown sampling parameter: x{200};"),
    ],
    ids=lambda value: value[:20],
)
def test_of_the_tensor(tokenizer: Tokenizer, text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse(tokenizer, sampling_parameters=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"temperature": NaN}', "`temperature`"),
        ('{"temperature": -Infinity}', "`temperature`"),
        ('{"timeout": Infinity}', "`timeout`"),
        ('{"timeout": 1e999}', "`timeout`"),
        ('{"top_k": 18446744073709551616}', "`top_k`"),
        ("[" * 100_000, "too many objects or lists within each other"),
    ],
)
def test_of_request_parameters(tokenizer: Tokenizer, text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse(tokenizer, text)


def test_so_much_json_and_no_more() -> None:
    filled = '{"max_tokens": 1' + " " * (MAX_PARAMETERS_LENGTH - 17)
    assert parse_sampling(filled + "}", "").max_tokens == 1
    with pytest.raises(InvalidRequestError, match="more than the limit of 1048576"):
        parse_sampling(filled + " }", "")
    with pytest.raises(InvalidRequestError, match="more than the limit of 1048576"):
        parse_sampling(None, filled + " }")


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        nested(64),
        {"type": "integer", "minimum": 10**400},
        {"enum": [10**400]},
        {"enum": [2**64, -(2**70)]},
        {"type": "string", "minLength": 2**70},
    ],
    ids=["64 deep", "minimum", "enum", "large enum", "minLength"],
)
def test_json_schemas_that_can_not_be_followed(tokenizer: Tokenizer, asked: dict[str, Any], as_text: bool) -> None:
    with pytest.raises(InvalidRequestError, match="guided_json"):
        parse(tokenizer, sampling_parameters={"guided_json": json.dumps(asked) if as_text else asked})


@pytest.mark.parametrize("text", ["[" * 3000, '{"a":' * 3000, '{"const": NaN}', '{"const": 1e', "{", '"a"', "1" * 5000])
def test_texts_that_are_no_json_schema(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequestError, match="guided_json"):
        parse(tokenizer, sampling_parameters={"guided_json": text})


@pytest.mark.parametrize(
    "asked",
    [
        nested(16),
        {"type": "integer", "maximum": 2**63},
        {"type": "integer", "maximum": 2**64},
    ],
    ids=["16 deep", "2^63", "2^64"],
)
def test_json_schemas_with_large_numbers_are_followed(tokenizer: Tokenizer, asked: dict[str, Any]) -> None:
    made = parse(tokenizer, sampling_parameters={"guided_json": asked})
    assert json.loads(made.sampling.guided_json) == asked


@pytest.mark.parametrize(
    "grammar",
    [
        {"guided_regex": "|".join(f"[{chr(i)}-{chr(i + 500)}]{{1,{i}}}" for i in range(0x100, 0x1100))},
        {"guided_regex": "(" * 5000 + "a" + ")" * 5000},
        {"guided_grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000},
        {"guided_grammar": "\n".join(f"A{i or ''}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "a"\nstart: A'},
    ],
    ids=["many expressions", "nested regex", "nested grammar", "exponential grammar"],
)
def test_grammars_beyond_their_limits(tokenizer: Tokenizer, grammar: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(grammar))) as caught:
        parse(tokenizer, sampling_parameters=grammar)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"json": {"type": "object"}}, "guided_json", '{"type": "object"}'),
        ({"regex": "a+"}, "guided_regex", "a+"),
        ({"choice": ["a", "b"]}, "guided_choice", ["a", "b"]),
        ({"grammar": 'start: "a"', "json": None}, "guided_grammar", 'start: "a"'),
    ],
)
def test_structured_outputs_is_vllms_newer_name(tokenizer: Tokenizer, given: dict, name: str, value: Any) -> None:
    made = parse(tokenizer, sampling_parameters={"structured_outputs": given})
    assert getattr(made.sampling, name) == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structured_outputs": {}}, "must be an object with one of json, regex, choice, grammar"),
        ({"structured_outputs": "x"}, "must be an object with one of"),
        ({"structured_outputs": {"jsn": {}}}, "must be an object with one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "guided_regex and guided_choice given"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "b"}, "guided_regex and structured_outputs given"),
        ({"structured_outputs": {"regex": "a("}}, "guided_regex: .*unclosed group"),
    ],
)
def test_wrong_structured_outputs(tokenizer: Tokenizer, options: dict, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse(tokenizer, sampling_parameters=options)


def test_negative_seeds_count_on_as_positive_ones_do(tokenizer: Tokenizer) -> None:
    """seed + 1 is the seed of the next of n outputs, across the end of the range too."""
    seeds = [
        parse(tokenizer, sampling_parameters={"seed": seed}).sampling.seed for seed in (-(2**63), -3, -2, 2**63 - 1)
    ]
    assert seeds == [0, 2**63 - 3, 2**63 - 2, 2**63 - 1]
    assert parse(tokenizer, sampling_parameters={"seed": -1}).sampling.seed is not None
