"""The README's examples and the client commands, run as they stand against a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import upstream
from helpers.gateway import RunningGateway
from helpers.triton import RunningServer

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
COMMAND = Path(sys.executable).with_name("tidewright")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def on_ports(text: str, server: RunningServer) -> str:
    return text.replace(":8000", f":{server.settings.http_port}").replace(":8001", f":{server.settings.grpc_port}")


def tidewright(server: RunningServer, *arguments: str, stdin: str | None = None) -> str:
    command = [COMMAND, *arguments, "--url", server.triton.http_url]
    return subprocess.run(command, input=stdin, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("script", [block for block in blocks("bash") if block.startswith("curl")])
def test_curl(bf16_server: RunningServer, script: str) -> None:
    run = subprocess.run(
        ["bash", "-c", on_ports(script, bf16_server)], check=True, capture_output=True, text=True, timeout=120
    )
    texts = [json.loads(line.removeprefix("data: "))["text_output"] for line in run.stdout.splitlines() if line]
    assert len("".join(texts)) > 10


def the_sea_is(server: RunningServer) -> str:
    options = {"max_tokens": 32, "temperature": 0}
    return server.generate(text_input="The sea is", stream=True, sampling_parameters=options).text


def test_python_grpc_streaming(bf16_server: RunningServer) -> None:
    (script,) = (block for block in blocks("python") if ":8001" in block)
    command = [sys.executable, "-c", on_ports(script, bf16_server)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == the_sea_is(bf16_server)


def test_tritonclient_streaming(bf16_server: RunningServer) -> None:
    (script,) = blocks("python", (ROOT / "docs/api.md").read_text())
    # Should it hang, its stack shows where.
    script = "import faulthandler; faulthandler.dump_traceback_later(90, exit=True)\n" + on_ports(script, bf16_server)
    run = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "") or run.stderr.startswith(upstream.CLIENT_HANGS), run.stderr
    assert run.stdout == the_sea_is(bf16_server)


def test_python_through_the_gateway(model_dir: Path, bf16_server: RunningServer) -> None:
    scripts = [block for block in blocks("python") if ":8080" in block]
    assert len(scripts) == 2
    with RunningGateway(model_dir, bf16_server) as gateway:
        for script in scripts:
            command = [sys.executable, "-c", script.replace(":8080", f":{gateway.port}")]
            run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
            assert (run.returncode, run.stderr) == (0, "")
            assert len(run.stdout) > 10


def test_complete(server: RunningServer) -> None:
    options = {"max_tokens": 12, "temperature": 0}
    expected = server.generate(text_input="The sea is", stream=True, sampling_parameters=options).text
    assert tidewright(server, "complete", "The sea is", "--max-tokens", "12") == expected + "\n"
    assert tidewright(server, "complete", "--max-tokens", "12", stdin="The sea is\n") == expected + "\n"


def test_chat(server: RunningServer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]
    options = {"max_tokens": 12, "temperature": 0}
    expected = server.generate("generate", messages=json.dumps(messages), stream=True, sampling_parameters=options).text
    answer = tidewright(
        server, "chat", "Say hello.", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "12"
    )
    assert answer == expected + "\n"


def test_ctrl_c_in_complete_ends_the_generation_on_the_server(bf16_server: RunningServer) -> None:
    start = bf16_server.metric("generated_tokens_total")
    command = [COMMAND, "complete", "1, 2, 3, 4,", "--max-tokens", "4000", "--url", bf16_server.triton.http_url]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    bf16_server.wait_idle()
    assert bf16_server.metric("generated_tokens_total") - start < 2000


def test_a_bad_request_is_one_line(server: RunningServer) -> None:
    command = [COMMAND, "complete", "x", "--max-tokens", "100000", "--url", server.triton.http_url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("Error: ")
    assert "context of 4096" in run.stderr
    assert len(run.stderr.splitlines()) == 1
