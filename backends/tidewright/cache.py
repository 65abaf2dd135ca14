"""Where prepared models live on disk, and how a model's name becomes a folder."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_BASE = "smollm2-135m-instruct"
"""The last part of its name on the Hugging Face hub, in small letters."""
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]{1,100}))?")
"""A branch, a tag or a commit may follow: only a commit is always the same model."""
MANIFEST = "tidewright.json"  # written last into a prepared folder: its presence means "complete"


class ModelNotPreparedError(FileNotFoundError):
    """The model is neither a prepared name nor a prepared folder."""


def cache_dir() -> Path:
    """`$TIDEWRIGHT_CACHE`, else `~/.cache/tidewright`."""
    return Path(os.environ.get("TIDEWRIGHT_CACHE") or Path.home() / ".cache" / "tidewright").expanduser()


def prepared_path(model: str) -> Path:
    """The folder that `tidewright prepare MODEL` fills: `<cache>/models/<slug of MODEL>`."""
    return cache_dir() / "models" / slug(model)


def fallback_path(model: str) -> Path:
    """The folder that `tidewright export-onnx MODEL` fills: the ONNX model that answers when MODEL can't."""
    return cache_dir() / "fallbacks" / slug(model)


def slug(model: str) -> str:
    """The model's name as that of a folder."""
    if Path(model).exists():
        model = Path(model).resolve().as_posix()
    return re.sub(r"[^A-Za-z0-9._@-]+", "--", model).strip("-")


def find_prepared(model: str) -> Path:
    """The ready folder of `model`: a prepared folder itself, or a name, file or hub id prepared before.

    Raises:
        ModelNotPreparedError: says which command prepares it.
    """
    for folder in (Path(model), prepared_path(model)):
        if (folder / MANIFEST).is_file():
            return folder.resolve()
    if model == EMBEDDED_MODEL or Path(model).exists() or HUB_ID.fullmatch(model):
        raise ModelNotPreparedError(f"model {model!r} is not prepared; run: tidewright prepare {shlex.quote(model)}")
    raise ModelNotPreparedError(no_such_model(model))


def prepared_at(folder: Path) -> int:
    """When a prepared folder became complete, in seconds since 1970: what is added to it later does not change that."""
    return int((folder / MANIFEST).stat().st_mtime)


def no_such_model(model: str) -> str:
    """What to say of a name that nothing can be made of."""
    what = f"neither {EMBEDDED_MODEL!r} nor a hub id (org/name, or org/name@revision)"
    return f"there is no file or folder {model!r}, and it is {what}"
