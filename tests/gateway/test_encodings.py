"""Bodies that are no UTF-8, and numbers that are none: one rule on all endpoints."""

from __future__ import annotations

import codecs
import json

import httpx
import pytest

from helpers.gateway import MODEL, RunningGateway
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.parsing import parse
from tidewright_gateway.openai.protocol import CompletionRequest, GenerationBody

ENDPOINTS = {
    "/v1/completions": {"model": MODEL, "prompt": "a"},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}


def post(gateway: RunningGateway, path: str, content: bytes) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(f"{gateway.url}{path}", content=content, headers=headers, timeout=60, trust_env=False)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_body_is_utf_8_without_a_byte_order_mark(echo_gateway: RunningGateway, path: str) -> None:
    text = json.dumps(ENDPOINTS[path])
    assert post(echo_gateway, path, f" \n{text}".encode()).status_code == 200
    others = [text.encode(name) for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")]
    for body in (codecs.BOM_UTF8 + text.encode(), *others):
        answer = post(echo_gateway, path, body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "invalid_json")
        assert error["message"] == "the body must be UTF-8, without a byte order mark"


def test_in_pieces_too(echo_gateway: RunningGateway) -> None:
    text = json.dumps(ENDPOINTS["/tokenize"])
    for encoding, status in (("utf-8", 200), ("utf-16-le", 400), ("utf-8-sig", 400)):
        pieces = (bytes([byte]) for byte in text.encode(encoding))
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(
            f"{echo_gateway.url}/tokenize", content=pieces, headers=headers, timeout=60, trust_env=False
        )
        assert answer.status_code == status


FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "timeout")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_numbers_are_finite_over_http_and_websocket(kind: type[GenerationBody], value: str) -> None:
    """Both read a body with `parse`."""
    body = json.dumps(ENDPOINTS["/v1/chat/completions" if kind is ChatRequest else "/v1/completions"])
    for text in (*(f'"{name}": {value}' for name in FLOATS), f'"logit_bias": {{"5": {value}}}'):
        error = error_of(kind, f"{body[:-1]}, {text}}}")
        assert (error.status, error.code) == (400, "invalid_json")


@pytest.mark.parametrize("name", ["top_k", "seed", "max_tokens", "min_tokens", "priority"])
def test_integers_are_bounded(name: str) -> None:
    for value in (2**63, 2**64, -(2**64), 10**30):
        body = json.dumps({**ENDPOINTS["/v1/completions"], name: value})
        assert error_of(CompletionRequest, body).param == name


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ('{"prompt": "a\\ud800"}', "invalid_json"),
        ('{"prompt": ' + "[" * 50_000 + "]" * 50_000 + "}", "invalid_json"),
        ('{"prompt": [' + "[]," * 100_000 + "[]]}", "too_many_items"),
        ('{"prompt": [' + "1," * 8192 + "1]}", "context_length_exceeded"),
        ('{"prompt": [[' + "1," * 8192 + "1]]}", "context_length_exceeded"),
        ('{"prompt": "a", "stop": [' + '"a",' * 8192 + '"a"]}', "context_length_exceeded"),
        ("{" + "".join(f'"a{number}":1,' for number in range(300)) + '"prompt": "a"}', "too_many_items"),
        ('{"prompt": "a", "metadata": {' + ",".join(f'"a{n}" :1' for n in range(100_001)) + "}}", "too_many_items"),
        ("[]", "invalid_value"),
        ("", "invalid_json"),
    ],
)
def test_a_body_is_bounded_in_every_direction(body: str, code: str) -> None:
    assert error_of(CompletionRequest, body).code == code


def test_colons_of_a_text_are_no_fields() -> None:
    body = {**ENDPOINTS["/v1/completions"], "prompt": ":" * 200_000}
    assert parse(CompletionRequest, json.dumps(body).encode(), 8192).prompt == body["prompt"]


def error_of(kind: type[GenerationBody], body: str) -> ApiError:
    with pytest.raises(ApiError) as refused:
        parse(kind, body.encode(), 8192).sampling()
    return refused.value
