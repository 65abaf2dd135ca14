"""Large numbers of JSON schemas, so that llguidance can not misread them: as floats, and bounds as 64-bit integers.

Bounds are moved inwards to the next number that it keeps, so that whatever follows the grammar also follows the schema.
Values of `const` and `enum` can't be moved: those that it would change are refused. Unchanged, some of
them crash it: -2**63 as a value, or as both bounds.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

EXACT = 2**53  # up to here, all integers are floats
_LARGEST = math.nextafter(2.0**63, 0)  # the largest float that is a 64-bit integer
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum")
_NO_MATTER = ("default", "examples", "example", "x-guidance")
_MARK = re.compile(r"%json\s*")
_decoder = json.JSONDecoder()


def kept(schema: Any) -> Any:
    """The schema with numbers that llguidance keeps. Raises ValueError: one of its values has no such number."""
    if isinstance(schema, list):
        return [kept(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in _BY_NAME and isinstance(value, dict):
            found[name] = {key: kept(part) for key, part in value.items()}
        elif name in _VALUES:
            _check(value, name)
            found[name] = value
        elif name in (*_LOWER, *_UPPER) and isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = _moved(value, is_lower=name in _LOWER)
        else:
            found[name] = value if name in _NO_MATTER else kept(value)
    return found


def kept_in_lark(grammar: str) -> str:
    """A Lark grammar, with the schemas that stand in it behind `%json` as `kept` makes them."""
    found, done = list[str](), 0
    for marker in _MARK.finditer(grammar):
        if marker.start() < done:  # within the schema before
            continue
        try:
            schema, end = _decoder.raw_decode(grammar, marker.end())
        except ValueError:  # llguidance says what is wrong with it, if it is no text that only looks so
            continue
        try:
            made = kept(schema)
        except ValueError as error:
            begin = grammar.rfind("\n", 0, marker.start()) + 1
            place = f"{grammar.count(chr(10), 0, marker.start()) + 1}({marker.start() - begin + 1})"
            raise ValueError(f"at {place}: {error}") from None  # as llguidance tells places
        found += [
            grammar[done : marker.end()],
            grammar[marker.end() : end] if made == schema else json.dumps(made, ensure_ascii=False),
        ]
        done = end
    return "".join([*found, grammar[done:]])


def _check(value: Any, name: str) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _check(part, name)
    elif isinstance(value, int) and abs(value) > EXACT:
        shown = value if abs(value) < 10**30 else f"of {value.bit_length()} bits"
        raise ValueError(f"{name}: the integer {shown} is too large; it may be from -2**53 to 2**53")


def _moved(bound: int | float, *, is_lower: bool) -> int | float:
    if abs(bound) <= EXACT:
        return bound
    if bound > _LARGEST:
        return bound if is_lower else int(_LARGEST)  # no number is behind the first, which llguidance says
    if bound < -_LARGEST:
        return -int(_LARGEST) if is_lower else bound
    near = float(bound)
    if is_lower and near < bound:
        near = math.nextafter(near, math.inf)
    elif not is_lower and near > bound:
        near = math.nextafter(near, -math.inf)
    return int(near) if near == int(near) else near
