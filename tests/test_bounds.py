"""Every number, text and list of the sampling parameters has a bound: what is beyond it is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest

from tidewright import schema
from tidewright.engine.messages import Submit, decode_to_engine, encode
from tidewright.schema import SamplingParams

INT32 = 2**31 - 1
SCHEMA_OVERHEAD = len('{"title": ""}')

# Of each parameter: values on its bounds or just inside, and values just beyond. What is open on one side has one.
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0, 100], [-1e-9, 100.001]),
    "top_k": ([-1, 0, INT32 - 1, INT32], [-2, INT32 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]),
    "top_p": ([1e-9, 1], [0, -0.1, 1.001]),
    "min_p": ([0, 1], [-0.001, 1.001]),
    "repetition_penalty": ([1e-9, 10], [0, 10.001]),
    "presence_penalty": ([-2, 2], [-2.001, 2.001]),
    "frequency_penalty": ([-2, 2], [-2.001, 2.001]),
    "logit_bias": (
        [{"0": -100}, {str(INT32): 100}, {str(i): 1 for i in range(299)}, {str(i): 1 for i in range(300)}],
        [{"-1": 1}, {str(INT32 + 1): 1}, {str(2**80): 1}, {"5": -100.1}, {"5": 100.1}, {str(i): 1 for i in range(301)}],
    ),
    "bad_words": ([[], ["x" * 63], ["x" * 64] * 64], [["x" * 65], [""], ["x"] * 65]),
    "allowed_token_ids": (
        [[0], [INT32], [1] * schema.MAX_ALLOWED_TOKEN_IDS],
        [[], [-1], [INT32 + 1], [2**64], [1] * (schema.MAX_ALLOWED_TOKEN_IDS + 1)],
    ),
    "guided_json": (
        ["x" * schema.MAX_GRAMMAR_LENGTH, {"title": "x" * (schema.MAX_GRAMMAR_LENGTH - SCHEMA_OVERHEAD)}],
        ["x" * (schema.MAX_GRAMMAR_LENGTH + 1), {"title": "x" * (schema.MAX_GRAMMAR_LENGTH - SCHEMA_OVERHEAD + 1)}],
    ),
    "guided_regex": (["x" * schema.MAX_GRAMMAR_LENGTH], ["x" * (schema.MAX_GRAMMAR_LENGTH + 1)]),
    "guided_grammar": (["x" * schema.MAX_GRAMMAR_LENGTH], ["x" * (schema.MAX_GRAMMAR_LENGTH + 1)]),
    "guided_choice": (
        [["x"] * schema.MAX_CHOICES, ["x" * schema.MAX_GRAMMAR_LENGTH]],
        [["x"] * (schema.MAX_CHOICES + 1), ["x" * (schema.MAX_GRAMMAR_LENGTH + 1)]],
    ),
    "seed": ([-(2**63), -2, 0, 2**63 - 1], [-(2**63) - 1, 2**63, 2**64]),
    "max_tokens": ([1, INT32], [0, -1, INT32 + 1, 2**40, 2**64]),
    "min_tokens": ([0, INT32], [-1, INT32 + 1, 2**64]),
    "stop": (
        ["x", "x" * 256, [], ["x"] * 16, ["x" * 256]],
        ["", "x" * 257, ["x"] * 17, [""], ["x" * 257]],
    ),
    "include_stop_str_in_output": ([True, False], [2]),
    "skip_special_tokens": ([True, False], [2]),
    "stop_token_ids": ([[], [0, INT32], [1] * 1023, [1] * 1024], [[-1], [INT32 + 1], [2**64], [1] * 1025]),
    "ignore_eos": ([True, False], [2]),
    "logprobs": ([0, 20], [-1, 21, 2**64]),
    "prompt_logprobs": ([0, 20], [-1, 21, 2**64]),
    "n": ([1, 16], [0, -1, 17, 2**64]),
    "priority": ([-(2**31), INT32], [-(2**31) - 1, INT32 + 1, 2**64]),
    "timeout": ([0, 1e9], [-0.001, 1.001e9, 10**400]),
    "ttft_target": ([0.001, 3600], [0, -1, 3601, 10**400]),
    "tpot_target": ([0.001, 3600], [0, -1, 3601, 10**400]),
    "cache_salt": (["x", "x" * 256], ["", "x" * 257]),
    "tenant": (["", "x" * schema.MAX_TENANT_LENGTH], ["x" * (schema.MAX_TENANT_LENGTH + 1)]),
    "tenant_weight": ([1, 1000], [0, 1001, 2**64]),
    "lora_name": (["x", "x" * 128, "org/sql-v2:3.1"], ["", "x" * 129, "-x", "a b", "a\n", "a,b", "a=b"]),
}


def make(name: str, value: Any) -> SamplingParams:
    return msgspec.convert({name: value}, SamplingParams, strict=False)


def test_no_parameter_is_forgotten_here() -> None:
    assert list(RANGES) == list(SamplingParams.__struct_fields__)


@pytest.mark.parametrize("name", RANGES)
def test_what_is_within_bounds_reaches_the_engine_as_it_is(name: str) -> None:
    for value in RANGES[name][0]:
        made = make(name, value)
        submit = Submit(1, [1], made)
        assert decode_to_engine(encode(submit)) == submit
        assert msgspec.json.decode(msgspec.json.encode(made), type=SamplingParams, strict=False) == made


@pytest.mark.parametrize("name", RANGES)
def test_what_is_beyond_is_refused_by_name(name: str) -> None:
    for value in RANGES[name][1]:
        with pytest.raises(msgspec.ValidationError, match=name):
            make(name, value)


def test_numbers_written_as_text_have_the_same_bounds() -> None:
    for name, (inside, beyond) in RANGES.items():
        for value in inside:
            if type(value) in (int, float):
                assert make(name, str(value)) == make(name, value)
        for value in beyond:
            if type(value) in (int, float) and value < 10**300:
                with pytest.raises(msgspec.ValidationError, match=name):
                    make(name, str(value))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "inf", "Infinity"])
def test_no_parameter_takes_what_is_not_a_finite_number(value: float | str) -> None:
    floats = [name for name, (inside, _) in RANGES.items() if type(inside[-1]) in (int, float)]
    for name in floats:
        with pytest.raises(msgspec.ValidationError):
            make(name, value)
    with pytest.raises(msgspec.ValidationError):
        make("logit_bias", {"5": value})


def test_integers_of_any_size_inside_a_json_schema_are_carried_as_text() -> None:
    asked = {"type": "integer", "maximum": 2**64, "enum": [2**70, -(2**70)]}
    submit = Submit(1, [1], make("guided_json", asked))
    assert json.loads(decode_to_engine(encode(submit)).sampling.guided_json) == asked


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**5000], ids=["nan", "infinity", "5001 digits"])
def test_what_json_can_not_write_is_refused(value: float) -> None:
    with pytest.raises(msgspec.ValidationError, match="guided_json is not JSON"):
        make("guided_json", {"const": value})


def test_nesting_without_end_is_refused() -> None:
    nested: dict[str, Any] = {}
    for _ in range(50_000):
        nested = {"a": nested}
    with pytest.raises((msgspec.ValidationError, RecursionError)):
        make("guided_json", nested)


def test_seed_minus_one_is_a_random_seed_as_in_vllm() -> None:
    assert make("seed", -1).seed is None
    assert make("seed", "-2").seed == -2
