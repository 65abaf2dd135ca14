"""distributed/fingerprint.py: other weights of the same sizes are noticed, and few of them are read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tidewright.distributed.fingerprint import SAMPLE, SAMPLES, files_fingerprint, model_fingerprint

MIB = 2**20
LARGE = 64 * MIB  # of which a sixteenth is read


def folder(path: Path, *contents: bytes, header: dict[str, str] | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    encoded = json.dumps({"__metadata__": header or {}}).encode()
    for number, content in enumerate(contents):
        file = path / f"model-{number}.safetensors"
        file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content)
    return path


def test_a_copy_is_the_same(tmp_path: Path) -> None:
    one, other = (folder(tmp_path / name, b"abc" * 9, b"def" * 5) for name in ("one", "other"))
    os.utime(other / "model-0.safetensors", (1, 1))
    assert model_fingerprint(one) == model_fingerprint(other)
    assert len(model_fingerprint(one)) == 32


@pytest.mark.parametrize("place", [0, 1, 40_000, 79_999])
def test_of_a_small_model_every_byte_counts(tmp_path: Path, place: int) -> None:
    content = bytearray(os.urandom(80_000))
    one = folder(tmp_path / "one", bytes(80_000), bytes(content))
    content[place] ^= 1
    other = folder(tmp_path / "other", bytes(80_000), bytes(content))
    assert files_fingerprint(one) == files_fingerprint(other)
    assert model_fingerprint(one) != model_fingerprint(other)


def test_headers_names_and_the_configuration_count(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", b"weights", header={"a": "1"})
    found = {model_fingerprint(one), model_fingerprint(folder(tmp_path / "other", b"weights", header={"a": "2"}))}
    (one / "model-0.safetensors").rename(one / "model.safetensors")
    found.add(model_fingerprint(one))
    (one / "config.json").write_text("{ }")
    found.add(model_fingerprint(one))
    assert len(found) == 4


@pytest.mark.parametrize("place", [0, 1, 17 * MIB + 12_345, LARGE - LARGE // SAMPLES - SAMPLE, LARGE - 1])
def test_of_a_large_model_every_stretch_counts(tmp_path: Path, place: int) -> None:
    """From anywhere on, as long as two samples lie apart, or to the end."""
    one = folder(tmp_path / "one", b"")
    os.truncate(one / "model-0.safetensors", LARGE)
    before = model_fingerprint(one)
    with (one / "model-0.safetensors").open("r+b") as file:
        file.seek(place)
        file.write(b"\1" * min(LARGE // SAMPLES + SAMPLE, LARGE - place))
    assert model_fingerprint(one) != before


def test_the_reads_are_bounded_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 GiB in four files, which take no room."""
    one = folder(tmp_path / "one", *[b""] * 4)
    for file in one.glob("*.safetensors"):
        os.truncate(file, 3 * 2**30)
    (one / "model-2.safetensors").open("r+b").write(b"\xff" * 8)  # a header that there can't be
    reads: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: (reads.append(size), pread(file, size, start))[1])
    model_fingerprint(one)
    assert len(reads) <= SAMPLES + 4 * 4
    assert sum(reads) <= (SAMPLES + 4 * 4) * SAMPLE


def test_a_file_that_is_empty_or_cut_short_has_a_fingerprint_too(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", b"weights")
    file = one / "model-0.safetensors"
    found = set()
    for size in (20, 8, 3, 0):
        os.truncate(file, size)
        found.add(model_fingerprint(one))
    assert len(found) == 4
