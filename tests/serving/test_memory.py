"""`tidewright memory` on a real server: its account, and a KV cache that is resized under a stream."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.triton import RunningServer

GREEDY = {"temperature": 0, "max_tokens": 120, "ignore_eos": True}


def memory(server: RunningServer, *arguments: str) -> tuple[int, str]:
    command = [str(Path(sys.executable).with_name("tidewright")), "memory", "--url", server.triton.http_url, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def kv_cache(report: str) -> float:
    """MiB."""
    return float(next(line for line in report.splitlines() if line.startswith("  KV cache")).split()[2])


def test_the_kv_cache_is_resized_under_a_stream(bf16_server: RunningServer) -> None:
    wanted = bf16_server.generate(text_input="Once upon a time", sampling_parameters=GREEDY).token_ids
    code, report = memory(bf16_server)
    whole = kv_cache(report)
    assert code == 0
    assert [line.split()[0] for line in report.splitlines()] == [
        *("budget", "weights", "workspace", "adapters", "KV", "in", "cached", "free")
    ]
    try:
        with bf16_server.stream() as stream:
            stream.send("1", text_input="Once upon a time", stream=True, sampling_parameters=GREEDY)
            stream.next()
            code, report = memory(bf16_server, "--kv", "80%")
            assert code == 0, report
            assert abs(kv_cache(report) - 0.8 * whole) < 1
            assert stream.finish()["1"].token_ids == wanted
        code, report = memory(bf16_server, "--kv", "1KiB")
        assert code == 1
        assert "Error: the KV cache can have " in report
    finally:
        assert memory(bf16_server, "--kv", "100%")[0] == 0
    bf16_server.wait_idle()
