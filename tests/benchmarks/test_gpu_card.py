"""benchmarks/gpu.sh: its dry run, and what becomes of parts that fail, hang or find no time."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import gpu_card
from benchmarks.gpu_card import Part

ROOT = Path(__file__).parent.parent.parent


def test_a_dry_run_measures_all_kinds_of_figures(tmp_path: Path) -> None:
    command = ["benchmarks/gpu.sh", "--python", sys.executable, "--out", str(tmp_path), "--dry-run"]
    run = subprocess.run([*command, "--parts", "correctness", "135M"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    tests, model = ({one["label"]: one for one in parts[name]["figures"]} for name in ("correctness", "135M"))
    assert tests["tests passed"]["value"] >= 9
    assert tests["tests failed"]["value"] == 0
    assert {label[:2] for label in model} >= {"W1", "W2", "W3", "W4"}
    goals = {label: one["goal"] for label, one in model.items() if "goal" in one}
    assert goals == {
        "40 requests/s, 64 in, 16 out: end to end p50": "under 30 ms",
        "40 requests/s, 64 in, 16 out: end to end p99": "under 50 ms",
        "decode of 1: share of that bandwidth": "at least 85 %",
        "decode of 2: share of that bandwidth": "at least 85 %",
    }
    assert all(one["value"] for one in model.values())
    assert "A dry run on the CPU with tiny shapes: the figures mean nothing." in run.stdout


def test_a_part_that_fails_or_hangs_says_so_and_leaves_no_process(tmp_path: Path) -> None:
    def run(script: str, limit: float) -> Part:
        return gpu_card._run("part", ["sh", "-c", script], limit, argparse.Namespace(out=tmp_path))

    assert run("true", 60).problem == ""
    assert run("echo first; echo no such GPU; exit 3", 60).problem == "exit status 3: no such GPU"
    assert run(f"sleep 600 & echo $! > {tmp_path}/child; wait", 2).problem == "not done after 2 s"
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 60  # the kernel takes its time, and nobody may be there to reap it
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_others_go_on_and_what_finds_no_time_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(name: str, limit: float, options: argparse.Namespace) -> Part:
        return Part("exit status 1: out of memory" if name == "1B" else "", figures=[{"label": name, "value": 3.5}])

    monkeypatch.setattr(gpu_card, "_measurements", measure)
    assert gpu_card.main(["--out", str(tmp_path), "--parts", "1B", "8B"]) == 1
    said = capsys.readouterr().out
    assert "1B (0 s)  PROBLEM exit status 1: out of memory" in said
    assert "8B (0 s)\n" in said
    assert gpu_card.main(["--out", str(tmp_path), "--parts", "8B", "--seconds", "5"]) == 1
    assert "8B (0 s)  PROBLEM not begun: 5 s are left" in capsys.readouterr().out
