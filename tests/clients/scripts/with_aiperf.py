"""NVIDIA's aiperf: a short run over streams, and what it counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import API_KEY, BASE_URL, MODEL, run

NUM_REQUESTS = 10
NUM_TOKENS = 12


def chat() -> None:
    profile("chat")


def completions() -> None:
    profile("completions")


def profile(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(str(Path(sys.executable).parent / "aiperf"), "profile", "--model", MODEL, "--api-key", API_KEY),
            *("--url", BASE_URL.removesuffix("/v1"), "--endpoint-type", kind, "--streaming"),
            "--use-server-token-count",  # exact; without it, aiperf tokenizes the text anew
            *("--tokenizer", os.environ["MODEL_DIR"], "--synthetic-input-tokens-mean", "20"),
            *("--output-tokens-mean", str(NUM_TOKENS), "--extra-inputs", f"min_tokens:{NUM_TOKENS}"),
            *("--extra-inputs", "ignore_eos:true", "--request-count", str(NUM_REQUESTS), "--concurrency", "2"),
            *("--ui", "none", "--output-artifact-dir", folder, "--random-seed", "1", "--workers-max", "1"),
        ]
        environment = {**os.environ, "HF_HOME": folder}  # HF_HUB_OFFLINE would make it refuse a folder as tokenizer
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        (report,) = Path(folder).rglob("profile_export_aiperf.json")
        found = json.loads(report.read_text())
    assert found["request_count"]["avg"] == NUM_REQUESTS
    assert not found.get("error_request_count", {}).get("avg")
    assert found["output_sequence_length"]["avg"] == NUM_TOKENS
    assert found["time_to_first_token"]["min"] > 0
    assert found["inter_token_latency"]["avg"] > 0
    assert found["request_latency"]["min"] > found["time_to_first_token"]["min"]


if __name__ == "__main__":
    run(globals())
