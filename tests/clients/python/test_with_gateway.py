"""The Python client with a real gateway: its examples, and sessions that break compared to one that does not."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers.cutting_proxy import CuttingProxy
from helpers.gateway import MODEL
from helpers.keyed_gateway import Keyed
from tidewright_client import Answer, AsyncClient, Client, Interrupted

FOLDER = Path(__file__).parent.parent.parent.parent / "clients" / "python"
# What each example prints, beside the model's words.
EXAMPLES = {
    "chat": ("tokens",),
    "stream": ("tokens",),
    "tools": ("get_weather({'city': '",),
    "errors_and_retries": ("no such model", "gpt-9", "model_not_found", MODEL),
    "cancel": ("...",),
    "session": (),
}
PROMPTS = ["The sea is", "Once upon a time", "Three fruits:"]
OPTIONS: dict[str, Any] = {"max_tokens": 48, "temperature": 0.9, "seed": 7}


def said_by(code: str, keyed: Keyed) -> str:
    """What a program prints."""
    environment = {**os.environ, "TIDEWRIGHT_URL": keyed.gateway.url, "TIDEWRIGHT_KEY": keyed.key}
    environment["PYTHONPATH"] = str(FOLDER / "src")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_works(keyed: Keyed, example: str) -> None:
    said = said_by((FOLDER / "examples" / f"{example}.py").read_text(), keyed)
    assert [words for words in EXAMPLES[example] if words not in said] == [], said


def test_the_readme_s_first_python_works(keyed: Keyed) -> None:
    code = (FOLDER.parent.parent / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert "tidewright_client" in code
    said_by(code.replace("http://127.0.0.1:8080", keyed.gateway.url), keyed)


def test_every_example_is_run() -> None:
    assert {path.stem for path in (FOLDER / "examples").iterdir() if path.suffix == ".py"} == set(EXAMPLES)


def by_threads(url: str, key: str) -> list[Answer]:
    with Client(url, model=MODEL, key=key) as client, client.session() as session:

        def answer(prompt: str) -> Answer:
            generation = session.stream_complete(prompt, credits=8, **OPTIONS)
            list(generation)
            return generation.answer()

        with ThreadPoolExecutor() as threads:
            return list(threads.map(answer, PROMPTS))


def by_tasks(url: str, key: str) -> list[Answer]:
    async def run() -> list[Answer]:
        async with AsyncClient(url, model=MODEL, key=key) as client, client.session() as session:

            async def answer(prompt: str) -> Answer:
                generation = session.stream_complete(prompt, credits=8, **OPTIONS)
                [event async for event in generation]
                return generation.answer()

            return await asyncio.gather(*map(answer, PROMPTS))

    return asyncio.run(run())


@pytest.mark.parametrize("caller", [by_threads, by_tasks])
def test_sessions_that_break_give_what_one_gives_that_does_not(keyed: Keyed, caller: Any) -> None:
    undisturbed = caller(keyed.gateway.url, keyed.key)
    assert all(answer.text and answer.usage.completion_tokens > 8 for answer in undisturbed)
    with Client(keyed.gateway.url, model=MODEL, key=keyed.key) as client:
        assert [answer.text for answer in undisturbed] == [client.complete(one, **OPTIONS).text for one in PROMPTS]
    chance = random.Random(4)
    with CuttingProxy(keyed.gateway.url, [chance.randrange(300, 4000) for _ in range(8)]) as proxy:
        broken = caller(proxy.url, keyed.key)
        assert proxy.broken >= 4
    for one, other in zip(undisturbed, broken, strict=True):
        assert (one.text, one.finish_reason, one.usage) == (other.text, other.finish_reason, other.usage)


def test_a_stream_that_a_proxy_cuts_is_interrupted_with_what_had_come(keyed: Keyed) -> None:
    with Client(keyed.gateway.url, model=MODEL, key=keyed.key) as client:
        whole = client.complete(PROMPTS[0], **OPTIONS).text
    with CuttingProxy(keyed.gateway.url, [3000]) as proxy, Client(proxy.url, model=MODEL, key=keyed.key) as client:
        with pytest.raises(Interrupted) as caught:
            list(client.stream_complete(PROMPTS[0], **OPTIONS))
    assert caught.value.partial is not None
    assert whole.startswith(caught.value.partial.text)
    assert 0 < len(caught.value.partial.text) < len(whole)
