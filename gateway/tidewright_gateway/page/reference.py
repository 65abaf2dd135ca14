"""What an OpenAPI document says, as `/docs` and docs/gateway-api.md show it: operations, objects and their fields."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_JSON, _EVENTS = "application/json", "text/event-stream"

Kind = tuple[str, str]
"""A type: text, and the name of the object that it means, or empty."""


@dataclass(frozen=True)
class Field:
    name: str
    kinds: Sequence[Kind]
    """The types that it may have."""
    meaning: str


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    meaning: str
    fields: Sequence[Field]
    """Of its body; empty if it takes none."""
    answers: Sequence[Kind]
    """What its answer may be; empty if that is a text."""
    events: Sequence[Kind]
    """The data of each event of its stream, if it has one."""


@dataclass(frozen=True)
class Object:
    """A part of a body or an answer that has fields of its own; or events, with their types in place of fields."""

    name: str
    meaning: str
    fields: Sequence[Field]


@dataclass(frozen=True)
class Reference:
    operations: Sequence[Operation]
    sent: Sequence[Object]
    """Objects of requests."""
    answered: Sequence[Object]
    """Those of answers that no request has."""


def read(document: dict[str, Any]) -> Reference:
    """`document`: OpenAPI 3."""
    schemas = document["components"]["schemas"]
    sent, answered = list[str](), list[str]()
    operations = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            body = _content(operation.get("requestBody", {}), _JSON)
            fields = _fields(schemas[_name(body)], sent) if body else []
            answer = operation["responses"]["200"]
            answers, events = (_named(_content(answer, kind), answered) for kind in (_JSON, _EVENTS))
            operations.append(Operation(method.upper(), path, operation["description"], fields, answers, events))
    for refusal in document["components"]["responses"].values():
        _named(_content(refusal, _JSON), answered)
    objects = _objects(schemas, sent)
    return Reference(operations, objects, [one for one in _objects(schemas, answered) if one.name not in sent])


def _content(message: dict[str, Any], media_type: str) -> dict[str, Any]:
    found: dict[str, Any] = message.get("content", {}).get(media_type, {}).get("schema", {})
    return found


def _named(schema: dict[str, Any], named: list[str]) -> list[Kind]:
    return _kinds(schema, named) if schema else []


def _objects(schemas: dict[str, Any], named: list[str]) -> list[Object]:
    found = []
    for name in named:  # grows while it is read
        schema = schemas[name]
        fields = list(_events(schemas, schema, named)) if "oneOf" in schema else _fields(schema, named)
        found.append(Object(name, schema.get("description", ""), fields))
    return found


def _events(schemas: dict[str, Any], schema: dict[str, Any], named: list[str]) -> Iterator[Field]:
    for name in map(_name, schema["oneOf"]):
        described = schemas[name]
        fields = [field for field in _fields(described, named) if field.name != "type"]
        parts = (" or ".join(text for text, _ in field.kinds) for field in fields)
        told = ", ".join(f"`{field.name}` ({part})" for field, part in zip(fields, parts, strict=True))
        kind = described["properties"]["type"]
        for type in kind.get("enum") or [kind["const"]]:
            yield Field(type, [("object", "")], ". ".join(filter(None, (told, described.get("description", "")))))


def _fields(schema: dict[str, Any], named: list[str]) -> list[Field]:
    found, needed = [], schema.get("required", [])
    is_sent = schema.get("additionalProperties") is False
    for name, value in schema.get("properties", {}).items():
        meaning = " ".join(value.get("description", "").split())
        if name in needed and is_sent:
            meaning = f"Required. {meaning}".strip()
        kinds = _kinds(value, named)
        if not is_sent:
            if name not in needed:
                meaning = f"Not always. {meaning}".strip()
            if any(one.get("type") == "null" for one in value.get("anyOf", ())):  # in a request, null is always allowed
                kinds.append(("null", ""))
        found.append(Field(name, kinds, meaning))
    return found


def _kinds(value: dict[str, Any], named: list[str]) -> list[Kind]:
    if "$ref" in value:
        name = _name(value)
        if name not in named:
            named.append(name)
        return [(name, name)]
    if "enum" in value:
        return [(f"`{word}`", "") for word in value["enum"]]
    if "const" in value:
        word = value["const"] if isinstance(value["const"], str) else json.dumps(value["const"])
        return [(f"`{word}`", "")]
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
