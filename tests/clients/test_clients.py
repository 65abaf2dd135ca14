"""Clients that people use, unchanged, against the real server: each check of each script in tests/clients/scripts/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.clients import FOLDER, Client, run_client
from helpers.gateway import MODEL, RunningGateway

CLIENTS = {
    "openai": Client(
        "with_openai.py",
        None,
        (
            "chat",
            "chat_stream_helper",
            "chat_async",
            "completions",
            "errors",
            "parse",
            "tools",
            "tool_choices",
            "tools_parse",
            "responses",
            "responses_previous",
            "responses_parse",
            "responses_tools",
        ),
        is_quick=True,
    ),
    "anthropic": Client(
        "with_anthropic.py",
        "anthropic",
        (
            "messages",
            "count_tokens",
            "errors",
            "tools",
        ),
        is_quick=True,
    ),
    "vercel-ai": Client(
        "with_vercel.mjs",
        "vercel",
        (
            "chat",
            "structured",
            "tools",
            "responses",
            "responses_by_reference",
            "responses_tools",
            "messages",
            "messages_tools",
        ),
        is_quick=True,
    ),
    "openai-agents": Client(
        "with_openai_agents.py",
        "agents",
        (
            "chat",
            "structured",
            "tools",
            "responses",
            "responses_tools",
        ),
    ),
    "langchain-openai": Client(
        "with_langchain.py",
        "agents",
        (
            "chat",
            "structured",
            "structured_json_mode",
            "structured_by_tool",
            "tools",
            "responses",
            "responses_tools",
        ),
    ),
    "pydantic-ai": Client(
        "with_pydantic_ai.py",
        "agents",
        (
            "chat",
            "structured",
            "structured_by_tool",
            "tools",
            "responses",
            "responses_tools",
            "messages",
            "messages_tools",
        ),
    ),
    "llm": Client("with_llm.py", "agents", ("chat", "structured", "tools")),
    "litellm": Client(
        "with_litellm.py",
        "litellm",
        (
            "chat",
            "completions",
            "structured",
            "errors",
            "tools",
            "responses",
            "responses_tools",
        ),
    ),
    "instructor": Client("with_instructor.py", "instructor", ("structured", "tools")),
    "lm-eval": Client("with_lm_eval.py", "lm_eval", ("generations", "log_likelihoods")),
    "aiperf": Client("with_aiperf.py", "aiperf", ("chat", "completions")),
}


def cases() -> Iterator[Any]:
    for name, client in CLIENTS.items():
        for check in client.checks:
            marks = [] if client.is_quick else [pytest.mark.slow]
            yield pytest.param(client, check, marks=marks, id=f"{name}-{check}")


@pytest.mark.timeout(1500)  # the first test of an environment makes it
@pytest.mark.parametrize(("client", "check"), cases())
def test_a_client_works_unchanged(gateway: RunningGateway, model_dir: Path, client: Client, check: str) -> None:
    run_client(client, check, BASE_URL=f"{gateway.url}/v1", MODEL=MODEL, API_KEY="none", MODEL_DIR=str(model_dir))


@pytest.mark.parametrize("client", [pytest.param(client, id=name) for name, client in CLIENTS.items()])
def test_every_check_of_a_script_is_listed(client: Client) -> None:
    text = (FOLDER / "scripts" / client.script).read_text()
    if client.script.endswith(".py"):
        found = re.findall(r"^(?:async )?def ([a-z]\w*)\(\) -> None:", text, re.MULTILINE)
    else:
        found = re.findall(r"^  (\w+): (?:async )?\(\) =>", text, re.MULTILINE)
    assert sorted(found) == sorted(client.checks)


def test_every_environment_is_used_and_pins_exact_versions() -> None:
    files = {path.stem: path for path in (FOLDER / "environments").iterdir()}
    of_generators = {"typescript"}  # test_typescript.py
    assert set(files) == {client.environment for client in CLIENTS.values() if client.environment} | of_generators
    for path in files.values():
        text = path.read_text()
        if path.suffix == ".txt":
            wrong = [line for line in text.splitlines() if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
        else:
            wrong = re.findall(r'": "([\^~><*][^"]*)"', text)
        assert not wrong
        assert "://" not in text
