"""Clients that people use, unchanged, against the real server: each check of each script in tests/clients/scripts/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.clients import FOLDER, Client, run_client
from helpers.gateway import MODEL, RunningGateway

TOOLS = "tools in chat completions"
RESPONSES = "the Responses API"
ITEM_REFERENCES = "items of the type item_reference in the Responses API"
MESSAGES = "Anthropic's Messages"
ECHO = "log-probabilities of the prompt in completions"

NOT_BUILT: set[str] = set()
"""Features that the server lacks. A check that needs one is skipped; remove the feature here to run it."""

CLIENTS = {
    "openai": Client(
        "with_openai.py",
        None,
        {
            "chat": (),
            "chat_stream_helper": (),
            "chat_async": (),
            "completions": (),
            "errors": (),
            "parse": (),
            "tools": (TOOLS,),
            "tool_choices": (TOOLS,),
            "tools_parse": (TOOLS,),
            "responses": (RESPONSES,),
            "responses_previous": (RESPONSES,),
            "responses_parse": (RESPONSES,),
            "responses_tools": (RESPONSES, TOOLS),
        },
        is_quick=True,
    ),
    "anthropic": Client(
        "with_anthropic.py",
        "anthropic",
        {
            "messages": (MESSAGES,),
            "count_tokens": (MESSAGES,),
            "errors": (MESSAGES,),
            "tools": (MESSAGES, TOOLS),
        },
        is_quick=True,
    ),
    "vercel-ai": Client(
        "with_vercel.mjs",
        "vercel",
        {
            "chat": (),
            "structured": (),
            "tools": (TOOLS,),
            "responses": (RESPONSES,),
            "responses_by_reference": (RESPONSES, ITEM_REFERENCES),
            "responses_tools": (RESPONSES, TOOLS),
            "messages": (MESSAGES,),
            "messages_tools": (MESSAGES, TOOLS),
        },
        is_quick=True,
    ),
    "openai-agents": Client(
        "with_openai_agents.py",
        "agents",
        {
            "chat": (),
            "structured": (),
            "tools": (TOOLS,),
            "responses": (RESPONSES,),
            "responses_tools": (RESPONSES, TOOLS),
        },
    ),
    "langchain-openai": Client(
        "with_langchain.py",
        "agents",
        {
            "chat": (),
            "structured": (),
            "structured_json_mode": (),
            "structured_by_tool": (TOOLS,),
            "tools": (TOOLS,),
            "responses": (RESPONSES,),
            "responses_tools": (RESPONSES, TOOLS),
        },
    ),
    "pydantic-ai": Client(
        "with_pydantic_ai.py",
        "agents",
        {
            "chat": (),
            "structured": (),
            "structured_by_tool": (TOOLS,),
            "tools": (TOOLS,),
            "responses": (RESPONSES,),
            "responses_tools": (RESPONSES, TOOLS),
            "messages": (MESSAGES,),
            "messages_tools": (MESSAGES, TOOLS),
        },
    ),
    "llm": Client("with_llm.py", "agents", {"chat": (), "structured": (), "tools": (TOOLS,)}),
    "litellm": Client(
        "with_litellm.py",
        "litellm",
        {
            "chat": (),
            "completions": (),
            "structured": (),
            "errors": (),
            "tools": (TOOLS,),
            "responses": (RESPONSES,),
            "responses_tools": (RESPONSES, TOOLS),
        },
    ),
    "instructor": Client("with_instructor.py", "instructor", {"structured": (), "tools": (TOOLS,)}),
    "lm-eval": Client("with_lm_eval.py", "lm_eval", {"generations": (), "log_likelihoods": (ECHO,)}),
    "aiperf": Client("with_aiperf.py", "aiperf", {"chat": (), "completions": ()}),
}


def cases() -> Iterator[Any]:
    for name, client in CLIENTS.items():
        for check, features in client.checks.items():
            marks = [] if client.is_quick else [pytest.mark.slow]
            if missing := sorted(NOT_BUILT.intersection(features)):
                marks.append(pytest.mark.skip(reason=f"not built yet: {', '.join(missing)}"))
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
    assert set(files) == {client.environment for client in CLIENTS.values() if client.environment}
    for path in files.values():
        text = path.read_text()
        if path.suffix == ".txt":
            wrong = [line for line in text.splitlines() if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
        else:
            wrong = re.findall(r'": "([\^~><*][^"]*)"', text)
        assert not wrong
        assert "://" not in text
