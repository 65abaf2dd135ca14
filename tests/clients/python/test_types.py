"""What the documents show passes `mypy --strict`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent
FOLDER = ROOT / "clients" / "python"


def test_examples_pass_mypy_strict(tmp_path: Path) -> None:
    files = sorted((FOLDER / "examples").glob("*.py"))
    assert files
    shown = tmp_path / "of_the_readme.py"
    shown.write_text((ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0])
    session = tmp_path / "session_of_the_clients_readme.py"
    code = (
        (FOLDER / "README.md").read_text().partition("## Sessions")[2].partition("```python\n")[2].partition("```")[0]
    )
    lines = ["from tidewright_client import AsyncClient", "async def main() -> None:"]
    session.write_text("\n".join([*lines, *(f"    {line}" for line in code.splitlines()), ""]))
    # `silent`: the client itself is held to the repository's own settings.
    options = [
        "--strict",
        "--config-file=",
        "--follow-imports=silent",
        f"--cache-dir={ROOT / '.mypy_cache' / 'strict'}",
    ]
    command = [sys.executable, "-m", "mypy", *options, *map(str, [*files, shown, session])]
    environment = {"MYPYPATH": str(FOLDER / "src"), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
