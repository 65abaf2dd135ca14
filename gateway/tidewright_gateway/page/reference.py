"""What an OpenAPI document says, as `/docs` and docs/gateway-api.md show it: operations, and fields of their bodies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    name: str
    kinds: tuple[tuple[str, str], ...]
    """The types that it may have: text, and the name of the object that it means, or empty."""
    meaning: str


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    meaning: str
    fields: list[Field]
    """Of its body; empty if it takes none."""


@dataclass(frozen=True)
class Object:
    """A part of a body that has fields of its own."""

    name: str
    meaning: str
    fields: list[Field]


def read(document: dict[str, Any]) -> tuple[list[Operation], list[Object]]:
    """`document`: OpenAPI 3."""
    schemas = document.get("components", {}).get("schemas", {})
    operations, named = [], list[str]()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            fields = _fields(schemas[_name(body)], named) if "$ref" in body else []
            meaning = operation.get("description", operation["summary"])
            operations.append(Operation(method.upper(), path, meaning, fields))
    objects = []
    for name in named:  # grows while it is read
        objects.append(Object(name, schemas[name].get("description", ""), _fields(schemas[name], named)))
    return operations, objects


def _fields(schema: dict[str, Any], named: list[str]) -> list[Field]:
    found, needed = [], schema.get("required", [])
    for name, value in schema.get("properties", {}).items():
        meaning = " ".join(value.get("description", "").split())
        if name in needed:
            meaning = f"Required. {meaning}".strip()
        found.append(Field(name, tuple(_kinds(value, named)), meaning))
    return found


def _kinds(value: dict[str, Any], named: list[str]) -> list[tuple[str, str]]:
    if "$ref" in value:
        name = _name(value)
        if name not in named:
            named.append(name)
        return [(name, name)]
    if "enum" in value:
        return [(f"`{word}`", "") for word in value["enum"]]
    if "const" in value:
        return [(f"`{value['const']}`", "")]
    if alternatives := value.get("anyOf") or value.get("oneOf"):
        parts = [kind for one in alternatives if one.get("type") != "null" for kind in _kinds(one, named)]
        kinds = dict.fromkeys(parts)
        if ("number", "") in kinds:
            kinds.pop(("integer", ""), None)
        return list(kinds) or [("null", "")]
    if value.get("type") == "array":
        return [(f"list of {text}", name) for text, name in _kinds(value.get("items", {}), named)]
    return [(value.get("type", "any"), "")]


def _name(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]
