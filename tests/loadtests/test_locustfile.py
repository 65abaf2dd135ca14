"""loadtests/locustfile.py, in a process of its own: to import locust changes the process for good (gevent)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

STARTED_BEFORE_IT_IS_INITIALIZED = """
from types import SimpleNamespace
from loadtests import locustfile
from locust.env import Environment
from locust.runners import WorkerRunner

environment = Environment()
environment.runner = object.__new__(WorkerRunner)
environment.parsed_options = SimpleNamespace(tidewright='{"users": 7}')
locustfile.begin(environment)
recorder = environment.tidewright
assert recorder.options.users == 7
locustfile.prepare(environment)
assert environment.tidewright is recorder, "two would report each request twice"
"""


def test_a_worker_may_hear_that_the_test_starts_before_it_is_initialized() -> None:
    """As one does whose master waits for it, on a slow machine."""
    command = [sys.executable, "-c", STARTED_BEFORE_IT_IS_INITIALIZED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
