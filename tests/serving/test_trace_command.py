"""`tidewright trace` over what a real `tidewright serve` has written: logs of every process and spans, in files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from helpers.processes import Serve

COMMAND = Path(sys.executable).with_name("tidewright")
BODY = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}


@dataclass
class Run:
    serve: Serve
    folder: Path

    @property
    def files(self) -> list[str]:
        return sorted(map(str, self.folder.iterdir()))

    def ask(self, request_id: str, sampled: bool) -> str:
        """Returns the trace's id."""
        trace_id = os.urandom(16).hex()
        headers = {"traceparent": f"00-{trace_id}-{'1' * 16}-0{sampled:d}", "X-Request-Id": request_id}
        url = f"http://127.0.0.1:{self.serve.gateway}/v1/chat/completions"
        answer = httpx.post(url, json=BODY, headers=headers, timeout=120, trust_env=False)
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Trace-Id"] == trace_id
        return trace_id

    def trace(self, wanted: str, *words: str) -> str:
        """What the command shows, once it has all these words: spans and log lines are written behind the answer."""
        deadline = time.monotonic() + 60
        while True:
            environment = {**os.environ, "COLUMNS": "240"}
            command = [COMMAND, "trace", wanted, *self.files]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
            if done.returncode == 0 and all(word in done.stdout for word in words):
                return done.stdout
            assert time.monotonic() < deadline, done.stdout + done.stderr
            time.sleep(0.2)

    def lines(self, trace_id: str) -> list[tuple[str, str]]:
        """Process and event of each log line of the trace."""
        found = []
        for file in self.files:
            for line in Path(file).read_text().splitlines():
                record = json.loads(line)
                if record.get("trace_id") == trace_id:
                    found.append((record["process"], record["event"]))
        return found


@pytest.fixture(scope="module")
def run(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("observed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIDEWRIGHT_GATEWAY_ACCESS_LOG", str(folder / "access.log"))
        patch.setenv("TIDEWRIGHT_GATEWAY_TRACE_CALLERS", "true")
        patch.setenv("TIDEWRIGHT_GATEWAY_TRACE_SLOW", "3600")
        serve = Serve(
            *("--model", str(model_dir), "--dtype", "float32", "--threads", "1", "--log-format", "json"),
            *("--log-level", "debug", "--log-file", str(folder / "serve.log")),
            *("--otlp-endpoint", f"file://{folder / 'spans.jsonl'}"),
        )
        try:
            serve.wait_ready()
            yield Run(serve, folder)
        finally:
            serve.process.send_signal(signal.SIGTERM)
            serve.wait(60)


def test_spans_and_lines_of_all_processes_make_one_timeline(run: Run) -> None:
    trace_id = run.ask("kept-1", sampled=True)
    words = ("POST /v1/chat/completions", "attempt", "bridge", "engine.prefill", "engine.decode", "request_received")
    for wanted in ("kept-1", trace_id):
        text = run.trace(wanted, *words, "trace kept", "sampled", "served by", "decoder", "8 out")
        assert trace_id in text
        assert "kept-1" in text


def test_a_request_that_is_not_sampled_is_known_by_its_trace_in_every_process(run: Run) -> None:
    trace_id = run.ask("plain-1", sampled=False)
    text = run.trace(trace_id, "request_received", "request_ended", "POST /v1/chat/completions")
    assert "engine.decode" not in text
    assert "plain-1" in text
    assert {("decoder", "request_received"), ("decoder", "request_ended"), ("gateway", "request")} <= {
        *run.lines(trace_id)
    }
    assert run.trace("plain-1", "request_received", "request_ended")
