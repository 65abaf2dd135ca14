"""Writes docs/gateway-api.md from a gateway's OpenAPI document: `python docs/make_gateway_api.py [URL]`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tidewright_gateway.page.reference import Field, Kind, read

PAGE = Path(__file__).with_name("gateway-api.md")
HEAD = """# The gateway's HTTP API

Made from its OpenAPI document (`/openapi.json`, shown at `/docs`) by `python docs/make_gateway_api.py`.
How to run the gateway, its errors and headers: [serving.md](serving.md). The WebSocket: [websocket.md](websocket.md).
Clients made of the document: [clients.md](clients.md#any-other-language).

Every error is an [ErrorBody](#errorbody), of Anthropic's API an [AnthropicError](#anthropicerror). Answers may have more fields in later versions.
"""
EXAMPLES = {
    "/v1/chat/completions": """curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d '{
  "model": "smollm2-135m", "messages": [{"role": "user", "content": "Name three fruits."}], "max_tokens": 32}'""",
    "/v1/completions": """curl -N http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' -d '{
  "model": "smollm2-135m", "prompt": "The sea is", "max_tokens": 16, "stream": true}'""",
    "/v1/messages": """curl http://127.0.0.1:8080/v1/messages -H 'Content-Type: application/json' -d '{
  "model": "smollm2-135m", "messages": [{"role": "user", "content": "Name three fruits."}], "max_tokens": 32}'""",
    "/v1/messages/count_tokens": """curl http://127.0.0.1:8080/v1/messages/count_tokens \\
  -H 'Content-Type: application/json' -d '{
  "model": "smollm2-135m", "messages": [{"role": "user", "content": "Name three fruits."}]}'""",
    "/v1/responses": """curl http://127.0.0.1:8080/v1/responses -H 'Content-Type: application/json' -d '{
  "model": "smollm2-135m", "input": "Name three fruits.", "max_output_tokens": 32}'""",
    "/tokenize": """curl http://127.0.0.1:8080/tokenize -H 'Content-Type: application/json' -d '{
  "prompt": "The sea is"}'""",
    "/detokenize": """curl http://127.0.0.1:8080/detokenize -H 'Content-Type: application/json' -d '{
  "tokens": [504, 1954]}'""",
    "/v1/models": "curl http://127.0.0.1:8080/v1/models",
    "/health/ready": "curl -i http://127.0.0.1:8080/health/ready",
}


def page(document: dict[str, Any]) -> str:
    """`document`: OpenAPI 3."""
    reference = read(document)
    parts = [HEAD]
    for operation in reference.operations:
        parts.append(f"\n## {operation.method} {operation.path}\n\n{operation.meaning}\n")
        if operation.fields:
            parts.append(f"\n{_table(operation.fields)}")
        if operation.answers:
            parts.append(f"\nAnswers {_kinds(operation.answers)}")
            parts.append(f"; streams events of {_kinds(operation.events)}.\n" if operation.events else ".\n")
        if example := EXAMPLES.get(operation.path):
            parts.append(f"\n```bash\n{example}\n```\n")
    for title, objects in (("Objects of requests", reference.sent), ("Objects of answers", reference.answered)):
        parts.append(f"\n## {title}\n")
        parts += [f"\n### {one.name}\n\n{one.meaning}\n\n{_table(one.fields)}" for one in objects]
    return re.sub(r"\n{3,}", "\n\n", "".join(parts))


def _table(fields: Sequence[Field]) -> str:
    rows = ["| field | type | meaning |\n|---|---|---|\n"]
    rows += [f"| `{field.name}` | {_kinds(field.kinds)} | {field.meaning} |\n" for field in fields]
    return "".join(rows)


def _kinds(kinds: Sequence[Kind]) -> str:
    return " or ".join(f"[{text}](#{name.lower()})" if name else text for text, name in kinds)


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
    PAGE.write_text(page(httpx.get(f"{url}/openapi.json", trust_env=False).json()), encoding="utf-8")
