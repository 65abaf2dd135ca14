"""Clients that people use, run unchanged as scripts, in environments of their own with pinned versions.

An environment is made on first use in the cache folder, from tests/clients/environments/NAME.txt (pip) or NAME.json
(npm), as loadtests/environments.py says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.needs import needs
from loadtests.environments import Install, install_with_pip, made, python_of, run
from tidewright.cache import cache_dir

FOLDER = Path(__file__).parent.parent / "clients"
NO_NODE = (
    "Node.js 20 or later and npm are missing; install them with `apt-get install nodejs npm`, or from nodejs.org where "
    "the distribution's are older"
)
_TIMEOUT = 240  # seconds of one script


@dataclass(frozen=True)
class Client:
    """A script in tests/clients/scripts/, and what it runs in."""

    script: str
    environment: str | None
    """None: the development environment, which has this client."""
    checks: tuple[str, ...]
    """Of the script."""
    is_quick: bool = False
    """Its environment is made within seconds, so that `make test` runs it as well."""


@needs("clients")
def run_client(client: Client, check: str, **variables: str) -> None:
    """Runs one check of its script, which ends with a traceback if the check fails."""
    script = FOLDER / "scripts" / client.script
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", **variables}
    if script.suffix == ".mjs":
        folder = npm_environment(str(client.environment))
        command = ["node", str(script), check]
        environment["NODE_ENVIRONMENT"] = str(folder)
    elif client.environment:
        command = [str(python_of(_made(client.environment, ".txt", install_with_pip))), str(script), check]
    else:
        command = [sys.executable, str(script), check]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode:
        pytest.fail(f"{client.script} {check}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}", pytrace=False)


def npm_environment(name: str) -> Path:
    return _made(name, ".json", _install_with_npm)


def _made(name: str, suffix: str, install: Install) -> Path:
    return made(FOLDER / "environments" / f"{name}{suffix}", cache_dir() / "clients", install)


def _install_with_npm(folder: Path, pins: Path) -> None:
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip(NO_NODE)
    folder.mkdir()
    shutil.copy(pins, folder / "package.json")
    # It also warns of a Node.js older than a package names.
    run(["npm", "install", "--prefix", str(folder), "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"])
