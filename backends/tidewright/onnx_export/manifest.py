"""`fallback.json` and `report.json` of an exported folder: what it holds, of which model, how close to it. No torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec

from tidewright.distributed.fingerprint import files_fingerprint
from tidewright.models.folder import eos_ids, read_json

MANIFEST = "fallback.json"  # written last: its presence means "complete"
REPORT = "report.json"
PRECISIONS = ("int8", "float32")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # the last if the model has it
FORMAT_VERSION = 2  # to be raised whenever the same model would be exported differently


def model_file(precision: str) -> str:
    return f"model.{precision}.onnx"


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What of the source the export depends on: it is made anew when any of this changes."""

    folder: str
    fingerprint: str
    stamp: str
    """Times of the files, as their sizes alone say little."""
    tokenizer_sha256: str
    """Of what token ids mean. Only models that have it in common can go on with each other's tokens."""
    eos_token_ids: tuple[int, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int
    source: Source
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    """Positions that the model has: prompt and answer together."""
    files: dict[str, dict[str, int]]
    """By precision: names of files, the graph's first, and their sizes in bytes."""
    created: str


class Closeness(msgspec.Struct, frozen=True, kw_only=True):
    """An exported model beside its source, which is computed in float32."""

    bytes: int
    perplexity: float
    same_next_token: float
    """Share of the text's positions after which both choose the same token."""
    common_prefix: float
    """How many tokens of greedy answers are the same before the first that differs, on average; up to answer_tokens."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Also `report.json`."""

    tokens: int
    answer_tokens: int
    source_perplexity: float
    models: dict[str, Closeness]


class IncompleteExportError(ValueError):
    """A folder is no export, or one that is cut short or of another version."""


def load_manifest(folder: Path) -> Manifest:
    """Raises IncompleteExportError."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise IncompleteExportError(
            f"{folder} holds no complete ONNX export of this version ({MANIFEST}); run `tidewright prepare`"
        )
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """None if the folder is not a complete export of this version."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
        files = [item for files in manifest.files.values() for item in files.items()]
        complete = all((folder / name).stat().st_size == size for name, size in files)
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
        return None
    return manifest if complete and manifest.format_version == FORMAT_VERSION else None


def read_source(folder: Path) -> Source:
    """Reads no weights. Raises ModelConfigError."""
    weights = [*folder.glob("*.safetensors")] or [*folder.glob("*.gguf")]  # of both, the export reads the plain ones
    files = [*weights, *(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())]
    stamps = sorted((file.name, file.stat().st_mtime_ns) for file in files)
    return Source(
        folder=str(folder),
        fingerprint=files_fingerprint(folder),
        stamp=hashlib.sha256(repr(stamps).encode()).hexdigest()[:32],
        tokenizer_sha256=tokenizer_sha256(folder),
        eos_token_ids=eos_ids(folder),
    )


def tokenizer_sha256(folder: Path) -> str:
    """The same for tokenizer files that give the same ids to the same pieces of text, however they are written down."""
    tokenizer = read_json(folder / "tokenizer.json")
    meaning = [tokenizer.get("model", {}).get("vocab"), tokenizer.get("added_tokens"), tokenizer.get("decoder")]
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()
