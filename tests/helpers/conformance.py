"""The vectors of clients/conformance and the scripted gateway that plays them, for the tests of each client."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from helpers.needs import needs

FOLDER = Path(__file__).parent.parent.parent / "clients" / "conformance"
VECTORS: list[dict[str, Any]] = [
    vector for file in sorted((FOLDER / "vectors").glob("*.json")) for vector in json.loads(file.read_text())
]
SCRIPTED = [vector for vector in VECTORS if "server" in vector]
AGAINST_GATEWAY = [vector for vector in VECTORS if "against" in vector]


@needs("gateway")
class ScriptedVectors:
    """The process of scripted.py."""

    def __enter__(self) -> ScriptedVectors:
        command = [sys.executable, str(FOLDER / "scripted.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout
        self.url = json.loads(self._process.stdout.readline())["url"]
        self._http = httpx.Client(timeout=30, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        self._process.communicate(timeout=30)
        assert self._process.returncode == 0

    def begin(self, vector: str) -> str:
        """The base URL for its client."""
        return str(self._http.post(f"{self.url}/runs", json={"vector": vector}).json()["base_url"])

    def faults(self, base_url: str) -> list[str]:
        """What the server saw that it should not have."""
        found: list[str] = self._http.post(f"{base_url}/verdict").json()["faults"]
        return found


@dataclass(frozen=True)
class Played:
    """What a client gave its caller."""

    events: list[list[Any]]
    """As the vectors write them."""
    answer: dict[str, Any]
    """Fields of the Answer, or of what had come of it."""
    error: dict[str, Any] | None
    """Its type and its fields."""


def check(expected: dict[str, Any], played: Played) -> None:
    """Against a vector's `expect`."""
    fields = {name: value for name, value in expected.items() if name not in ("error", "events", "checks")}
    if told := expected.get("error"):
        assert played.error, f"no error, but {played.answer}"
        _check_error(told, played.error)
    else:
        assert not played.error, played.error
    if "text_length" in fields:
        assert len(played.answer["text"]) == fields.pop("text_length")
    assert {name: played.answer.get(name) for name in fields} == fields
    if "events" in expected:
        assert played.events == expected["events"]


def _check_error(expected: dict[str, Any], error: dict[str, Any]) -> None:
    fields = {name: value for name, value in expected.items() if not name.startswith("message_")}
    assert {name: error.get(name) for name in fields} == fields
    assert [text for text in expected.get("message_has", ()) if text not in error["message"]] == []
    assert [text for text in expected.get("message_lacks", ()) if text in error["message"]] == []
