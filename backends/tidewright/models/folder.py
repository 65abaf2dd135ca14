"""The small files of a model folder. No torch: the command line reads them, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tidewright.models.config import ModelConfigError


def read_json(file: Path) -> dict[str, Any]:
    """Raises ModelConfigError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelConfigError(f"{file} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelConfigError(f"{file} does not hold a JSON object")
    return content


def eos_ids(folder: Path) -> tuple[int, ...]:
    """From generation_config.json, which often names more of them, else from config.json."""
    value: Any = None
    if (folder / "generation_config.json").is_file():
        value = read_json(folder / "generation_config.json").get("eos_token_id")
    if value is None:
        value = read_json(folder / "config.json").get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
