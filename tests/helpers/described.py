"""Whether answers are what the OpenAPI document says, by jsonschema, which knows nothing of the code that made either.

The document lets later versions add fields, so that old clients go on; here a field that it does not name is a fault.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import httpx
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

_JSON, _EVENTS = "application/json", "text/event-stream"


class Conformance:
    def __init__(self, document: dict[str, Any]) -> None:
        self._document = copy.deepcopy(document)
        _close(self._document["components"]["schemas"])
        self._validators: dict[str, Draft202012Validator] = {}
        self.seen: set[tuple[str, str, str]] = set()
        """Method, path and kind (`whole`, `stream` or `error`) of each answer that was checked."""

    def check(self, method: str, path: str, answer: httpx.Response) -> None:
        """`path`: as the document has it. Raises AssertionError: the answer is something else."""
        responses = self._document["paths"][path][method]["responses"]
        is_error = answer.status_code != 200
        kind = answer.headers["content-type"].partition(";")[0]
        described = self._resolved(responses[f"{answer.status_code // 100}XX" if is_error else "200"])["content"]
        assert kind in described, (method, path, kind)
        if kind == _EVENTS:
            failure = self._resolved(responses["5XX"])["content"][_JSON]["schema"]
            self._check_events(answer.text, described[kind]["schema"], failure)
        elif kind == _JSON:
            self._validate(described[kind]["schema"], json.loads(answer.text))
        self.seen.add((method, path, "error" if is_error else "stream" if kind == _EVENTS else "whole"))

    def check_events(self, written: bytes, name: str, error: str = "ErrorBody") -> None:
        """`name`: of the schema of their data; `error`: of that with which they may end."""
        self._check_events(written.decode(), _reference(name), _reference(error))

    def check_object(self, found: Any, name: str) -> None:
        self._validate(_reference(name), found)

    def _check_events(self, text: str, schema: dict[str, Any], failure: dict[str, Any]) -> None:
        blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
        assert blocks
        for number, block in enumerate(blocks):
            (data,) = (line.removeprefix("data: ") for line in block.split("\n") if line.startswith("data: "))
            if data == "[DONE]":
                assert number == len(blocks) - 1
            else:
                is_failure = "error" in json.loads(data) and number == len(blocks) - 1
                self._validate(failure if is_failure else schema, json.loads(data))

    def _validate(self, schema: dict[str, Any], found: Any) -> None:
        key = json.dumps(schema)
        if key not in self._validators:
            rooted = {**schema, "components": self._document["components"]}
            self._validators[key] = Draft202012Validator(rooted)
        error = best_match(self._validators[key].iter_errors(found))
        assert error is None, f"{error.json_path}: {error.message[:500]}"

    def _resolved(self, response: dict[str, Any]) -> dict[str, Any]:
        name = response.get("$ref", "").rpartition("/")[2]
        found: dict[str, Any] = self._document["components"]["responses"][name] if name else response
        return found


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _close(part: Any) -> None:
    """Forbids fields that an object does not name."""
    if isinstance(part, dict):
        if part.get("type") == "object" and "properties" in part:
            part.setdefault("additionalProperties", False)
        for value in part.values():
            _close(value)
    elif isinstance(part, list):
        for value in part:
            _close(value)
