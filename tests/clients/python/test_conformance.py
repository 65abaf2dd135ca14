"""Each vector of clients/conformance, with the sync client and with the async one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from helpers.conformance import AGAINST_GATEWAY, FOLDER, SCRIPTED, VECTORS, Played, ScriptedVectors, check
from helpers.gateway import MODEL
from helpers.keyed_gateway import Keyed
from helpers.python_client import CALLERS

LEFT_OUT: set[str] = set()
"""Vectors that this client does not pass."""


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedVectors]:
    with ScriptedVectors() as running:
        yield running


@pytest.fixture
def caller(request: pytest.FixtureRequest) -> Any:
    return CALLERS[request.param]


def named(vectors: list[dict[str, Any]]) -> Any:
    cases = [
        pytest.param(caller, vector, id=f"{vector['name']}-{caller}")
        for vector in vectors
        for caller in CALLERS
        if vector["name"] not in LEFT_OUT
    ]
    return pytest.mark.parametrize(("caller", "vector"), cases, indirect=["caller"])


@named(SCRIPTED)
def test_a_scripted_vector(scripted: ScriptedVectors, caller: Any, vector: dict[str, Any]) -> None:
    base_url = scripted.begin(vector["name"])
    played = caller(base_url, vector)
    assert scripted.faults(base_url) == []
    check(vector.get("expect", {}), played)


@named(AGAINST_GATEWAY)
def test_a_vector_against_the_real_gateway(keyed: Keyed, caller: Any, vector: dict[str, Any]) -> None:
    gateway = keyed.gateway
    request = {"model": MODEL, **vector["request"]}
    vector = {**vector, "request": request, "client": {"key": keyed.key, **vector.get("client", {})}}
    played: Played = caller(gateway.url, vector)
    check(vector["expect"], played)
    checks = vector["expect"].get("checks", {})
    if checks.get("stream_equals_whole"):
        whole = caller(gateway.url, {**vector, "stream": False})
        assert not whole.error
        assert whole.answer["text"] == played.answer["text"] != ""
    if checks.get("usage_adds_up"):
        usage = played.answer["usage"]
        assert min(usage.values()) > 0
        assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    if "finish_in" in checks:
        assert played.answer["finish_reason"] in checks["finish_in"]
    if "calls" in checks:
        (call,) = played.answer["tool_calls"]
        assert call["name"] == checks["calls"]
        assert isinstance(json.loads(call["arguments"]), dict)
    if "idle_within" in checks:
        until = time.monotonic() + checks["idle_within"]
        while gateway.metric("generations_running") or gateway.metric("replica_in_flight"):
            assert time.monotonic() < until
            time.sleep(0.05)


def test_no_vector_is_left_out() -> None:
    print("vectors that are left out:", ", ".join(sorted(LEFT_OUT)) or "none")
    assert not LEFT_OUT
    assert len({vector["name"] for vector in VECTORS}) == len(VECTORS) == len(SCRIPTED) + len(AGAINST_GATEWAY)


def test_the_vectors_follow_their_schema() -> None:
    schema = json.loads((FOLDER / "schema.json").read_text())
    for file in (FOLDER / "vectors").glob("*.json"):
        jsonschema.validate(json.loads(file.read_text()), schema)
