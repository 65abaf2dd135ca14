"""cargo for clients/rust, with the crates of Debian's packages in place of crates.io.

What it compiles stays in the cache folder, so that only the first run compiles the dependencies. cargo sees the crate
there through links: a Cargo.lock that the user has made from crates.io stays as it is. Each checkout has its own
folder: in a shared one cargo can't tell the crate of two checkouts apart, and would run the other's program.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.needs import needs
from helpers.toolchains import passed, run
from tidewright.cache import cache_dir

FOLDER = Path(__file__).parent.parent.parent / "clients" / "rust"
REGISTRY = Path("/usr/share/cargo/registry")
_SOURCE = ("--offline", "--config", 'source.crates-io.replace-with="debian"')
_DIRECTORY = ("--config", f'source.debian.directory="{REGISTRY}"')
_TIMEOUT = 280  # seconds; the first run compiles all dependencies


def run_cargo(command: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`cargo COMMAND` with crates from Debian; the test fails with all that it said if it does."""
    return passed(try_cargo(command, *words, **variables))


def try_cargo(command: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return _run(["cargo", command, *_SOURCE, *_DIRECTORY, *words], _linked(), **variables)


def run_documented(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """A cargo command as a document has it, with nothing added."""
    assert words[0] == "cargo"
    return _run(words, _linked(), **variables)


@needs("gateway")
def run_cargo_tests(*words: str, **variables: str) -> str:
    """`cargo test`, which starts the scripted gateway."""
    return run_cargo("test", *words, **variables).stdout


def format_check() -> str:
    """What `cargo fmt` would change."""
    return _run(["cargo", "fmt", "--check"], FOLDER).stdout


def _run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # No settings of the caller's own that would compile all anew.
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("RUSTFLAGS", "TIDEWRIGHT_"))}
    settings = {
        "CARGO_TARGET_DIR": str(_place() / "target"),
        "CARGO_PROFILE_DEV_DEBUG": "0",
        "RUST_BACKTRACE": "0",
        "PYTHON": sys.executable,
        "NO_PROXY": "127.0.0.1,localhost",
    }
    return run(command, folder, {**ours, **settings, **variables}, _TIMEOUT)


def _place() -> Path:
    """Of this checkout."""
    return cache_dir() / "rust" / hashlib.sha256(str(FOLDER.resolve()).encode()).hexdigest()[:12]


def _linked() -> Path:
    """Links to the crate's files, beside which cargo writes a Cargo.lock of Debian's versions."""
    folder = _place() / FOLDER.name
    for other in _place().parent.glob(f"*/{FOLDER.name}/Cargo.toml"):
        if not other.exists():  # its checkout is gone
            shutil.rmtree(other.parent.parent, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    targets = [FOLDER / one for one in ("Cargo.toml", "README.md", "src", "tests", "examples")]
    links = {folder / target.name: target for target in targets}
    links[folder.parent / "conformance"] = FOLDER.parent / "conformance"
    for link, target in links.items():
        with contextlib.suppress(FileExistsError):  # of an earlier run, or a worker beside this one
            link.symlink_to(target.resolve())
    return folder
