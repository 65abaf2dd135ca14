"""The config.json of a model that is on this disk: nothing is downloaded, and no weights are read."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from tidewright.cache import HUB_ID, ModelNotPreparedError, find_prepared
from tidewright.models.config import ModelConfigError
from tidewright.models.folder import read_json

MAX_CONFIG_BYTES = 1 << 20
# Said of what the engine does not compute yet, in words that people know.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_model_config(model: str) -> tuple[str, dict[str, Any]]:
    """Where it was found, and what it says. `model`: a prepared name, a folder, a config.json, or a hub id.

    Raises:
        ModelConfigError: there is none, or it is not readable.
    """
    file = _find(model)
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelConfigError(f"{file} is larger than 1 MiB, which no config.json is")
    config = read_json(file)
    for name in _EXPERTS:
        if config.get(name):
            raise ModelConfigError(f"{file} sets {name}: mixtures of experts are not supported")
    return str(file), config


def _find(model: str) -> Path:
    if not model:  # which would be the current folder
        raise ModelConfigError("the model's name is empty")
    path = Path(model)
    if path.is_file() and path.suffix == ".json":
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    try:
        return find_prepared(model) / "config.json"
    except ModelNotPreparedError as error:
        if path.is_dir():
            raise ModelConfigError(f"{path} holds no config.json") from None
        if path.is_file() and path.suffix != ".gguf":
            raise ModelConfigError(f"{path} is no config.json; give one, or a model's folder or name") from None
        if (found := HUB_ID.fullmatch(model)) and not path.exists():
            return _in_hub_cache(model, found["repository"], found["revision"])
        raise ModelConfigError(str(error)) from None


def _in_hub_cache(model: str, repository: str, revision: str | None) -> Path:
    """What huggingface_hub has on disk."""
    try:
        from huggingface_hub import try_to_load_from_cache

        if isinstance(file := try_to_load_from_cache(repository, "config.json", revision=revision), str):
            return Path(file)
    except (ImportError, ValueError):
        pass
    raise ModelConfigError(
        f"{model} is not on this disk; run: tidewright prepare {shlex.quote(model)}, or download its config.json and "
        "give its path"
    )
