"""Schemas of arguments, of the kinds that people use; all of them end soon also where a model draws at random."""

# ruff: noqa: E501 - a table
from __future__ import annotations

from typing import Any

_SHORT = {"type": "string", "maxLength": 12}


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), **more}


SCHEMAS: dict[str, dict[str, Any]] = {
    "empty": {"type": "object", "properties": {}},
    "string": _object({"text": _SHORT}),
    "pattern": _object({"code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}}),
    "format": _object({"day": {"type": "string", "format": "date"}}),
    "enum": _object({"unit": {"enum": ["celsius", "fahrenheit"]}}),
    "const": _object({"kind": {"const": "forecast"}}),
    "integer bounds": _object({"days": {"type": "integer", "minimum": 1, "maximum": 14}}),
    "negative bounds": _object({"offset": {"type": "integer", "minimum": -20, "exclusiveMaximum": 0}}),
    "number bounds": _object({"share": {"type": "number", "minimum": 0, "maximum": 1}}),
    "multiple": _object({"size": {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 5}}),
    "boolean and null": _object({"on": {"type": "boolean"}, "note": {"type": ["string", "null"], "maxLength": 8}}),
    "array": _object({"ids": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "maxItems": 4}}),
    "array of enums": _object({"days": {"type": "array", "items": {"enum": ["mon", "tue"]}, "minItems": 1, "maxItems": 3}}),
    "tuple": _object({"point": {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": [1, 2]}], "items": False, "minItems": 2}}),
    "nested": _object({"place": _object({"city": _SHORT, "where": _object({"lat": {"type": "integer", "minimum": 0, "maximum": 90}})})}),
    "array of objects": _object({"items": {"type": "array", "items": _object({"name": _SHORT}), "minItems": 1, "maxItems": 2}}),
    "ref": _object({"from": {"$ref": "#/$defs/place"}, "to": {"$ref": "#/$defs/place"}}, **{"$defs": {"place": {"enum": ["here", "there"]}}}),
    "recursive ref": _object({"tree": {"$ref": "#/$defs/node"}}, **{"$defs": {"node": _object({"value": {"enum": [0, 1]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}}), "leaf": _object({"value": {"enum": [2, 3]}})}}),
    "any of": _object({"id": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"enum": ["new"]}]}}),
    "unicode": _object({"straße": {"enum": ["Köln", "東京", "😀"]}}),
    "optional": {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"enum": [2]}, "c": _SHORT}, "required": ["b"]},
}  # fmt: skip
