"""Writes docs/gateway-api.md from a gateway's OpenAPI document: `python docs/make_gateway_api.py [URL]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import httpx

PAGE = Path(__file__).with_name("gateway-api.md")
HEAD = """# The gateway's HTTP API

Made from its OpenAPI document (`/openapi.json`, shown at `/docs`) by `python docs/make_gateway_api.py`.
How to run the gateway, its errors and headers: [serving.md](serving.md). The WebSocket: [websocket.md](websocket.md).
"""
EXAMPLES = {
    "/v1/chat/completions": """curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d '{
  "model": "smollm2-135m", "messages": [{"role": "user", "content": "Name three fruits."}], "max_tokens": 32}'""",
    "/v1/completions": """curl -N http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' -d '{
  "model": "smollm2-135m", "prompt": "The sea is", "max_tokens": 16, "stream": true}'""",
    "/tokenize": """curl http://127.0.0.1:8080/tokenize -H 'Content-Type: application/json' -d '{
  "prompt": "The sea is"}'""",
    "/detokenize": """curl http://127.0.0.1:8080/detokenize -H 'Content-Type: application/json' -d '{
  "tokens": [504, 1954]}'""",
    "/v1/models": "curl http://127.0.0.1:8080/v1/models",
    "/health/ready": "curl -i http://127.0.0.1:8080/health/ready",
}


def page(document: dict[str, Any]) -> str:
    """`document`: OpenAPI 3."""
    schemas = document.get("components", {}).get("schemas", {})
    parts = [HEAD]
    named: list[str] = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"\n## {method.upper()} {path}\n\n{operation.get('description', operation['summary'])}\n")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if "$ref" in body:
                parts.append("\n" + _table(schemas[_name(body)], named))
            if example := EXAMPLES.get(path):
                parts.append(f"\n```bash\n{example}\n```\n")
    for name in named:  # grows while it is read
        parts.append(f"\n### {name}\n\n{schemas[name].get('description', '')}\n\n{_table(schemas[name], named)}")
    return "".join(parts)


def _table(schema: dict[str, Any], named: list[str]) -> str:
    rows = ["| field | type | meaning |\n|---|---|---|\n"]
    needed = schema.get("required", [])
    for field, value in schema.get("properties", {}).items():
        meaning = " ".join(value.get("description", "").split())
        if field in needed:
            meaning = f"Required. {meaning}".strip()
        kind = _type(value, named).replace("|", "\\|")
        rows.append(f"| `{field}` | {kind} | {meaning} |\n")
    return "".join(rows)


def _type(value: dict[str, Any], named: list[str]) -> str:
    if "$ref" in value:
        name = _name(value)
        if name not in named:
            named.append(name)
        return f"[{name}](#{name.lower()})"
    if "enum" in value:
        return " or ".join(f"`{word}`" for word in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if "anyOf" in value:
        kinds = dict.fromkeys(_type(one, named) for one in value["anyOf"] if one.get("type") != "null")
        if "number" in kinds:
            kinds.pop("integer", None)
        return " or ".join(kinds) or "null"
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}), named)}"
    return value.get("type", "any")


def _name(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
    PAGE.write_text(page(httpx.get(f"{url}/openapi.json", trust_env=False).json()), encoding="utf-8")
