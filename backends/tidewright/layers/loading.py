"""Reads a folder of safetensors, one file or sharded, straight into the layers' own weights.

Peak memory is one tensor more than the model: files are memory-mapped, each layer reads only its part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tidewright.layers.tensor_parallel import Loader

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """The checkpoint is not readable, or is not of this model."""


@torch.inference_mode()
def load_weights(folder: Path, loaders: Mapping[str, Loader], ignored: frozenset[str] = frozenset()) -> None:
    """Gives every weight in `folder` to the loader of its name.

    Raises:
        CheckpointError: files or weights are missing, unexpected (and not `ignored`), or of a wrong shape.
    """
    loaded: set[str] = set()
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                for stored in weights.keys():  # noqa: SIM118 (not a dict)
                    # A model saved without its head, as embedding models are, has names without the prefix.
                    name = stored if stored in loaders or stored in ignored else f"model.{stored}"
                    if name in loaders:
                        _load(stored, loaders[name], weights.get_slice(stored))
                    elif name not in ignored:
                        raise CheckpointError(f"{file}: this architecture has no weight named {stored}")
                    loaded.add(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    if missing := sorted(set(loaders) - loaded):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(f"{folder}: the checkpoint lacks {shown}")


def _load(name: str, loader: Loader, source: object) -> None:
    try:
        loader(source)  # type: ignore[arg-type]  # safetensors ships no types
    except ValueError as error:
        raise CheckpointError(f"weight {name}: {error}") from error


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{folder}: {INDEX_FILE} names files that are not there: {', '.join(absent)}")
    return files
