"""TypeScript clients, made of an OpenAPI document by two generators and compiled with scripts that use them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from helpers.clients import FOLDER, npm_environment
from helpers.needs import needs
from helpers.toolchains import passed, run

SCRIPTS = sorted((FOLDER / "scripts").glob("*.ts"))
_TIMEOUT = 240  # seconds of one program


@needs("clients")
class GeneratedClients:
    """Node.js runs the checks of their scripts."""

    def __init__(self, document: dict[str, Any], folder: Path) -> None:
        """`folder`: an empty one."""
        self._folder, environment = folder, npm_environment("typescript")
        programs = environment / "node_modules" / ".bin"
        (folder / "openapi.json").write_text(json.dumps(document))
        (folder / "node_modules").symlink_to(environment / "node_modules")
        for script in SCRIPTS:
            shutil.copy(script, folder)
        options = {
            "strict": True,
            "esModuleInterop": True,
            "target": "es2022",
            "module": "commonjs",
            "moduleResolution": "node10",
            "types": ["node"],
            "outDir": "made",
        }
        (folder / "tsconfig.json").write_text(json.dumps({"compilerOptions": options, "include": ["*.ts"]}))
        generator = [str(programs / "openapi-ts"), "-i", "openapi.json", "-o", "tidewright"]
        self._run([*generator, "-c", "@hey-api/client-fetch"])
        self._run([str(programs / "openapi-typescript"), "openapi.json", "-o", "openapi.d.ts"])
        self._run([str(programs / "tsc")])

    def check(self, script: str, name: str = "", **variables: str) -> None:
        """Runs one check of a script; it fails with all that it said."""
        self._run(["node", str(self._folder / "made" / f"{script}.js"), name], **variables)

    def _run(self, command: list[str], **variables: str) -> None:
        passed(run(command, self._folder, {**os.environ, "NO_PROXY": "127.0.0.1", **variables}, _TIMEOUT))
