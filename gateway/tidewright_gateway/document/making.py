"""Makes the document of the application's routes and the table of operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaValue, models_json_schema

from tidewright_gateway.document.base import Schemas
from tidewright_gateway.document.errors import AnthropicError, ErrorBody
from tidewright_gateway.document.operations import OPERATIONS, TAGS, Described
from tidewright_gateway.http.authentication import FOR_ALL

_SCHEMA = "#/components/schemas/{model}"
_JSON = "application/json"
_KEYS = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key or a JWT, if the gateway asks for keys.",
    },
    "apiKey": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same, as Anthropic's clients send it.",
    },
}
_ERROR_HEADERS = {
    "X-Request-Id": {"description": "Also in the gateway's log.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds to wait before a retry.", "schema": {"type": "integer"}},
}
_REFUSALS: dict[tuple[type[BaseModel], ...], str] = {
    (ErrorBody,): "Refused",
    (AnthropicError,): "AnthropicRefused",
    (ErrorBody, AnthropicError): "EitherRefused",
}
"""Names of answers with these errors."""

References = dict[type[BaseModel], JsonSchemaValue]


def make(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    kinds = dict.fromkeys(model for one in OPERATIONS.values() for model in one.models)
    found, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=_SCHEMA, schema_generator=Schemas
    )
    references: References = {kind: found[kind, "validation"] for kind in kinds}
    refusals = {name: _refusal(errors, references) for errors, name in _REFUSALS.items()}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            methods[method] = _operation(OPERATIONS[method, path], path, operation, references)
    return {
        "openapi": document["openapi"],
        "info": document["info"],
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": meaning} for name, meaning in TAGS.items()],
        "security": [{}, *({name: []} for name in _KEYS)],
        "paths": document["paths"],
        "components": {"securitySchemes": _KEYS, "responses": refusals, "schemas": definitions["$defs"]},
    }


def _operation(described: Described, path: str, operation: dict[str, Any], references: References) -> dict[str, Any]:
    """`operation`: as FastAPI describes it, which knows neither bodies nor answers."""
    made: dict[str, Any] = {"operationId": described.id, "tags": [described.tag]}
    made |= {name: operation[name] for name in ("description", "parameters") if name in operation}
    if path in FOR_ALL:
        made["security"] = []
    if described.body:
        made["requestBody"] = {"content": {_JSON: {"schema": references[described.body]}}, "required": True}
    refused = {"$ref": f"#/components/responses/{_REFUSALS[described.errors]}"}
    made["responses"] = {"200": _answer(described, references), "4XX": refused, "5XX": refused}
    return made


def _answer(described: Described, references: References) -> dict[str, Any]:
    if not described.answers:
        return {"description": "A text.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    content: dict[str, Any] = {_JSON: {"schema": _any_of(described.answers, references)}}
    description = "The answer."
    if described.events:
        content["text/event-stream"] = {"schema": references[described.events]}
        description = "The answer; with stream: true, server-sent events, the data of each as this schema says."
    return {"description": description, "content": content}


def _refusal(errors: Sequence[type[BaseModel]], references: References) -> dict[str, Any]:
    return {
        "description": "The request failed; the message says what to change.",
        "headers": _ERROR_HEADERS,
        "content": {_JSON: {"schema": _any_of(errors, references)}},
    }


def _any_of(models: Sequence[type[BaseModel]], references: References) -> JsonSchemaValue:
    found = [references[model] for model in models]
    return found[0] if len(found) == 1 else {"anyOf": found}
