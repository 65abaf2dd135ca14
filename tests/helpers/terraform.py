"""Terraform itself, without its registry: what it runs must need no provider."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

MISSING = "terraform is missing; install it from https://developer.hashicorp.com/terraform/install"
_TIMEOUT = 120  # seconds of one command


def terraform(folder: Path, *words: str) -> str:
    """Its standard output; raises AssertionError with what it said if it fails."""
    program = shutil.which("terraform")
    assert program, MISSING
    # No configuration of the user's, no questions, no look for a newer version.
    environment = {**os.environ, "TF_CLI_CONFIG_FILE": os.devnull, "TF_INPUT": "0", "CHECKPOINT_DISABLE": "1"}
    done = subprocess.run(
        [program, f"-chdir={folder}", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, f"terraform {' '.join(words)} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def outputs(folder: Path) -> dict[str, Any]:
    """Of a root module without resources, applied."""
    terraform(folder, "init", "-backend=false", "-no-color")
    terraform(folder, "apply", "-auto-approve", "-no-color")
    found = json.loads(terraform(folder, "output", "-json"))
    return {name: one["value"] for name, one in found.items()}
