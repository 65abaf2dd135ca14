"""fallback.json: what counts as the same source, and what as a complete folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tidewright.onnx_export.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    read_manifest,
    read_source,
    tokenizer_sha256,
)

TOKENIZER = {
    "truncation": None,
    "added_tokens": [{"id": 2, "content": "</s>", "special": True}],
    "pre_tokenizer": None,
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "</s>": 2}, "merges": []},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"truncation": {"max_length": 9}, "pre_tokenizer": {"type": "Digits"}}, True),
        ({"model": {"merges": [], "type": "BPE", "vocab": {"</s>": 2, "b": 1, "a": 0}}}, True),
        ({"model": {"type": "BPE", "vocab": {"a": 1, "b": 0, "</s>": 2}, "merges": []}}, False),
        ({"added_tokens": []}, False),
        ({"decoder": None}, False),
    ],
)
def test_tokenizers_are_the_same_if_ids_mean_the_same(source: Path, changes: dict[str, Any], same: bool) -> None:
    before = tokenizer_sha256(source)
    (source / "tokenizer.json").write_text(json.dumps(TOKENIZER | changes, indent=2))
    assert (tokenizer_sha256(source) == before) == same


def test_changed_weights_or_settings_are_another_source(source: Path) -> None:
    before = read_source(source)
    assert before.eos_token_ids == (2,)
    assert read_source(source) == before
    os.utime(source / "model.safetensors", ns=(1, 1))
    touched = read_source(source)
    assert touched != before
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert read_source(source).eos_token_ids == (2, 0)


def test_a_gguf_file_counts_if_it_is_what_is_read(source: Path) -> None:
    (source / "model.gguf").write_bytes(b"the same weights")
    beside_plain = read_source(source)
    os.utime(source / "model.gguf", ns=(1, 1))
    assert read_source(source) == beside_plain
    (source / "model.safetensors").unlink()
    alone = read_source(source)
    os.utime(source / "model.gguf", ns=(2, 2))
    assert read_source(source) != alone


def test_only_a_complete_folder_of_this_version_counts(source: Path) -> None:
    folder = source / "export"
    folder.mkdir()
    assert read_manifest(folder) is None
    (folder / "model.int8.onnx").write_bytes(b"graph")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=read_source(source),
        vocab_size=3,
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        max_length=8,
        files={"int8": {"model.int8.onnx": 5}},
        created="now",
    )

    def write(manifest: Manifest) -> None:
        (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))

    write(manifest)
    assert read_manifest(folder) == manifest
    write(msgspec.structs.replace(manifest, format_version=FORMAT_VERSION + 1))
    assert read_manifest(folder) is None
    write(manifest)
    (folder / "model.int8.onnx").write_bytes(b"cut")
    assert read_manifest(folder) is None
    (folder / "model.int8.onnx").unlink()
    assert read_manifest(folder) is None
    (folder / MANIFEST).write_text("{")
    assert read_manifest(folder) is None
