"""The command `llm`: a model of extra-openai-models.yaml, with schemas, tools and conversations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import API_KEY, BASE_URL, CITY_QUESTION, MAX_TOKENS, MODEL, QUESTION, Fruit, run

TOOL = """
def get_weather(city: str) -> str:
    "The weather in a city."
    return "4 degrees"
"""
temporary = tempfile.TemporaryDirectory()  # until the script ends
folder = Path(temporary.name)
OPTIONS = ("-o", "temperature", "0", "-o", "max_tokens", str(MAX_TOKENS))


def llm(*words: str) -> str:
    (folder / "extra-openai-models.yaml").write_text(f"""
- model_id: tidewright
  model_name: {MODEL}
  api_base: {BASE_URL}
  supports_schema: true
  supports_tools: true
""")
    environment = {**os.environ, "LLM_USER_PATH": str(folder), "OPENAI_API_KEY": API_KEY}
    command = [sys.executable, "-m", "llm", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def chat() -> None:
    whole = llm("-m", "tidewright", *OPTIONS, "--no-stream", QUESTION)
    assert whole.strip()
    assert llm("-m", "tidewright", *OPTIONS, QUESTION) == whole
    assert llm("-c", *OPTIONS, "Another one.").strip()
    (first, *_) = json.loads(llm("logs", "--json", "-n", "0"))
    assert first["output_tokens"] > 0


def structured() -> None:
    schema = json.dumps(Fruit.model_json_schema())
    answers = [
        llm("-m", "tidewright", "-o", "temperature", "0", *stream, "--schema", schema, QUESTION)
        for stream in ((), ("--no-stream",))
    ]
    assert Fruit.model_validate_json(answers[0]) == Fruit.model_validate_json(answers[1])


def tools() -> None:
    """The command can't demand a call; the server must take the tools, and the answer ends with or without one."""
    for stream in ((), ("--no-stream",)):
        llm("-m", "tidewright", *OPTIONS, *stream, "--functions", TOOL, "--chain-limit", "2", CITY_QUESTION)


if __name__ == "__main__":
    run(globals())
