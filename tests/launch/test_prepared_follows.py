"""A folder that was prepared from another one follows its files: all of those that serving reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from tidewright.cache import MANIFEST
from tidewright.launch.prepare import prepare

QUIET = Console(quiet=True)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIDEWRIGHT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "source"
    folder.mkdir()
    weights = ["model-1.safetensors", "model-2.safetensors"]
    for name in weights:
        (folder / name).write_bytes(b"1234")
    files = {
        "config.json": {"eos_token_id": 1},
        "tokenizer.json": {"a": 1},
        "tokenizer_config.json": {"a": 1},
        "generation_config.json": {"a": 1},
        "special_tokens_map.json": {"a": 1},
        "model.safetensors.index.json": {"weight_map": {name: name for name in weights}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text("one")
    return folder


def prepared_at(source: Path) -> int:
    return (prepare(str(source), QUIET) / MANIFEST).stat().st_mtime_ns


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "model.safetensors.index.json",
        "chat_template.jinja",
    ],
)
def test_a_changed_file_is_taken_though_size_and_time_stay(source: Path, name: str) -> None:
    folder, file = prepare(str(source), QUIET), source / name
    before, status = prepared_at(source), file.stat()
    text = file.read_text()
    changed = "two" if name.endswith(".jinja") else text.replace("1", "2", 1) if "weight" not in text else text + " "
    file.write_text(changed)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert prepared_at(source) > before
    assert (folder / name).read_text() == changed
    again = prepared_at(source)
    assert prepared_at(source) == again


def test_changed_weights_are_taken(source: Path) -> None:
    before = prepared_at(source)
    weights = source / "model-2.safetensors"
    weights.unlink()
    weights.write_bytes(b"12345")
    assert prepared_at(source) > before
    assert (prepare(str(source), QUIET) / weights.name).read_bytes() == b"12345"


def test_a_file_that_is_gone_goes(source: Path) -> None:
    folder = prepare(str(source), QUIET)
    assert (folder / "chat_template.jinja").exists()
    (source / "chat_template.jinja").unlink()
    assert not (prepare(str(source), QUIET) / "chat_template.jinja").exists()


def test_other_files_change_nothing(source: Path) -> None:
    before = prepared_at(source)
    (source / "README.md").write_text("x")
    assert prepared_at(source) == before
