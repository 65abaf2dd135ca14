"""The logs of `tidewright serve` and of all below it, in JSON: each line is a record, and each process has a name."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import httpx
import pytest

from helpers.processes import Serve, child


def ask(running: Serve, name: str) -> httpx.Response:
    body = {"model": "smollm2-135m", "prompt": "unspeakable", "max_tokens": 3}
    url = f"http://127.0.0.1:{running.gateway}/v1/completions"
    return httpx.post(url, json=body, headers={"X-Request-Id": name}, timeout=120, trust_env=False)


def test_all_lines_are_records_and_a_request_is_found_in_all_processes(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    running = Serve("--log-format=json", "--log-level=debug", "--threads=1", f"--model={model_dir}")
    try:
        running.wait_ready()
        assert ask(running, "first").status_code == 200
        child(running.process.pid, "tidewright.engine").kill()
        assert ask(running, "second").status_code == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
    finally:
        running.process.kill()
    found = [json.loads(line) for line in running.log.splitlines()]
    assert all({"time", "level", "process", "pid", "event", "message"} <= line.keys() for line in found)
    events = [(line["process"], line["event"]) for line in found]
    wanted = [
        ("decoder", "engine_ready"),
        ("decoder", "request_received"),  # of serve itself
        ("decoder", "request_ended"),
        ("serve", "ready"),
        ("decoder", "engine_died"),
        ("decoder", "engine_restarted"),
        ("serve", "stopping"),
    ]
    assert [one for one in dict.fromkeys(events) if one in wanted] == wanted
    assert ("gateway", "replica_up") in events
    ended = [line.get("request_id") for line in found if line["event"] == "request_ended"]
    assert ended.count("first-0") == ended.count("second-0") == 1
    levels = {line["event"]: line["level"] for line in found}
    assert (levels["engine_died"], levels["engine_restarted"], levels["ready"]) == ("error", "info", "info")
    of_triton = [line for line in found if line["process"] == "triton"]
    assert any(line["source"].startswith("server.cc:") for line in of_triton if "source" in line)
    with_source = next(line for line in of_triton if "source" in line)
    engine = next(line for line in found if line["event"] == "engine_ready")
    assert abs(_seconds(with_source["time"]) - _seconds(engine["time"])) < 600  # both are UTC, whatever the time zone
    assert "unspeakable" not in running.log


def test_a_log_file_has_all_of_it_and_the_terminal_what_is_for_people(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.log"
    running = Serve("--log-format=json", f"--log-file={file}", "--threads=1", f"--model={model_dir}")
    try:
        running.wait_ready()
        file.rename(tmp_path / "serve.1")
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
    finally:
        running.process.kill()
    assert "Try:" in running.log
    assert '"event"' not in running.log
    before, after = (
        [json.loads(line)["event"] for line in path.read_text().splitlines()] for path in (tmp_path / "serve.1", file)
    )
    assert {"engine_ready", "ready", "replica_up"} <= set(before)
    assert "stopping" in after


def test_a_log_file_that_can_not_be_written_is_one_clear_line(tmp_path: Path) -> None:
    running = Serve(f"--log-file={tmp_path}/none/it.log")
    assert running.wait(60) == 1
    assert running.log == f"Error: log_file: can't write {tmp_path}/none/it.log: No such file or directory\n"


def _seconds(text: str) -> float:
    return time.mktime(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))
