"""Large numbers in schemas: what follows the grammar follows the schema, and nothing crashes llguidance."""

from __future__ import annotations

import json
import operator
from typing import Any

import llguidance
import pytest

from tidewright.sampling.grammar import GrammarError, _byte_tokenizer, check_grammar, make_matcher
from tidewright.schema import SamplingParams

HOLDS = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}
BOUNDS = [2**53 + 1, 2**53 + 2, 2**62 + 1, 2**63 - 1, 2**63, 2**64 - 1, 10**30]


def as_json(schema: dict[str, Any]) -> SamplingParams:
    return SamplingParams(guided_json=json.dumps(schema))


def as_lark(schema: dict[str, Any]) -> SamplingParams:
    """With a text around it that looks like the beginning of another schema."""
    return SamplingParams(guided_grammar=f'start: "%json [" %json {json.dumps({"title": "%json {", **schema})}')


def takes(params: SamplingParams, text: str) -> bool:
    matcher: llguidance.LLMatcher = make_matcher(params, _byte_tokenizer())
    given = list((text if params.guided_json else f"%json [{text}").encode())
    return matcher.try_consume_tokens(given) == len(given) and matcher.is_accepting()


@pytest.mark.parametrize("made", [as_json, as_lark])
@pytest.mark.parametrize("bound", [*BOUNDS, *(-bound for bound in BOUNDS)])
@pytest.mark.parametrize("name", HOLDS)
def test_bounds_hold(made: Any, name: str, bound: int) -> None:
    schema = {"type": "integer", name: bound}
    near = [bound + step for step in (-3000, -2, -1, 0, 1, 2, 3000)]
    try:
        taken = [value for value in near if takes(made(schema), str(value))]
    except GrammarError:
        assert abs(bound) > 2**62  # no 64-bit integer is in the range
        return
    assert all(HOLDS[name](value, bound) for value in taken)
    if abs(bound) < 2**62:
        assert taken  # most of the range is still there


@pytest.mark.parametrize("made", [as_json, as_lark])
@pytest.mark.parametrize(
    "schema",
    [
        {"const": -(2**63)},
        {"enum": ["a", [{"b": -(2**63) - 1}]]},
        {"const": 2**53 + 1},
        {"anyOf": [{"type": "object", "properties": {"const": {"const": 10**40}}}]},
        {"$defs": {"enum": {"enum": [2**70]}}, "$ref": "#/$defs/enum"},
    ],
)
def test_values_that_would_change_are_refused(made: Any, schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match=r"(const|enum): the integer .* is too large"):
        check_grammar(made(schema))


@pytest.mark.parametrize("made", [as_json, as_lark])
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": -(2**63), "maximum": -(2**63) + 5},
        {"allOf": [{"type": "integer", "minimum": -1e20}, {"type": "integer", "maximum": -1e20}]},
        {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 1},
        {"type": "integer", "minimum": 1e19, "maximum": 1e20},
    ],
)
def test_a_range_without_a_number_is_refused(made: Any, schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match=r"nsatisfiable|range"):
        check_grammar(made(schema))


def test_in_a_grammar_the_place_is_told() -> None:
    grammar = 'start: a | b\na: %json {"const": 1}\nb: "b" %json {"const": 9007199254740993}'
    with pytest.raises(GrammarError, match=r"^guided_grammar: at 3\(8\): const: the integer"):
        check_grammar(SamplingParams(guided_grammar=grammar))


def test_a_whole_int64_is_taken() -> None:
    schema = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    assert takes(as_json(schema), str(2**62))
    assert takes(as_json(schema), str(-(2**62)))
    assert takes(as_json({"enum": [2**53, -(2**53)], "default": 2**70}), str(2**53))
    names = {"type": "object", "properties": {"minimum": {"const": 1}}, "required": ["minimum"]}
    assert takes(as_json(names), '{"minimum": 1}')
