"""The command itself: its help, its version, and that asking for them is cheap."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tidewright import __version__
from tidewright.launch.cli import main


@pytest.mark.parametrize(
    "command", ["bench", "chat", "complete", "doctor", "export-onnx", "lora", "model", "prepare", "serve"]
)
def test_every_command_is_listed_and_explains_itself(command: str) -> None:
    assert f"  {command} " in CliRunner().invoke(main, ["--help"]).output
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert f"Usage: main {command}" in result.output


def test_an_adapter_folder_that_is_none_shows_before_anything_is_prepared() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        result = CliRunner().invoke(main, ["serve", "--adapter-folder", "/none"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (result.exit_code, "there is no folder /none" in result.output) == (1, True)


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"tidewright, version {__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from tidewright.launch.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'gguf', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prepare_prints_the_folder_and_nothing_else(model_dir: Path) -> None:
    result = CliRunner().invoke(main, ["prepare"])
    assert (result.exit_code, result.stdout) == (0, f"{model_dir}\n")


def test_prepare_of_nothing_is_one_line() -> None:
    result = CliRunner().invoke(main, ["prepare", "no-such-model"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there is no file or folder 'no-such-model'")
    assert result.stderr.count("\n") == 1
