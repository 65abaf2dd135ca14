"""Exports a prepared model to ONNX, completely or not at all: what `export-onnx` and `prepare` run."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tidewright.launch.errors import ExportError
from tidewright.launch.folders import locked, new_folder, write_json
from tidewright.launch.progress import progress_bar, waiting
from tidewright.launch.space import check_space, full, is_full
from tidewright.models.config import ModelConfigError
from tidewright.onnx_export.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    REPORT,
    TOKENIZER_FILES,
    Manifest,
    Source,
    model_file,
    read_manifest,
    read_source,
)

_ELSEWHERE = "choose another folder with --output"
_PACKAGES = ("onnx", "onnxruntime", "torch")


def export(folder: Path, target: Path, precisions: Sequence[str], console: Console, force: bool = False) -> bool:
    """Fill `target` from the prepared `folder`; returns whether there was anything to do.

    Raises:
        ExportError: says what to change.
    """
    try:
        source = read_source(folder)
        if not force and _is_ready(target, source, precisions):
            return False
        _check_packages()
        if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
            raise ExportError(f"{target} is there and is not an exported model; remove it, or choose another --output")
        with locked(target, console):
            if not force and _is_ready(target, source, precisions):
                return False  # another run made it while this one waited
            with new_folder(target) as new:
                _fill(new, source, precisions, console)
    except ModelConfigError as error:
        raise ExportError(f"can't export {folder}: {error}") from error
    except OSError as error:
        if is_full(error):
            raise ExportError(full(f"can't export {folder}", target.parent, _ELSEWHERE)) from error
        raise ExportError(
            f"can't export {folder} to {target}: {error}. Free some space, or choose another folder with --output."
        ) from error
    return True


def _is_ready(target: Path, source: Source, precisions: Sequence[str]) -> bool:
    manifest = read_manifest(target)
    return manifest is not None and manifest.source == source and set(precisions) <= manifest.files.keys()


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"exporting needs {' and '.join(missing)}; run: pip install 'tidewright[server,fallback]'"
            " (`prepare` does without them if told --no-fallback)"
        )


def _fill(folder: Path, source: Source, precisions: Sequence[str], console: Console) -> None:
    # Not at the top: they load torch and onnx.
    from tidewright.devices.cpu.step_threads import set_threads
    from tidewright.layers.loading import CheckpointError
    from tidewright.onnx_export.decoder import decoder_graph
    from tidewright.onnx_export.report import Reference, read_passages
    from tidewright.onnx_export.source import SourceModel
    from tidewright.onnx_export.weights import bytes_needed, model_tensors, write_model

    set_threads(0, sharers=1)
    origin = Path(source.folder)
    try:
        with waiting(console, "Reading the weights in float32"):
            model = SourceModel(origin)
    except CheckpointError as error:
        raise ExportError(f"can't read the weights: {error}; prepare the model anew") from error
    graphs = {name: decoder_graph(model.architecture, model.config, int8=name == "int8") for name in precisions}
    tensors = model_tensors(model.decoder)
    needed = sum(bytes_needed(tensors, graph) for graph in graphs.values())
    check_space(folder, needed, "the export", _ELSEWHERE, ExportError)
    files: dict[str, dict[str, int]] = {}
    for precision, graph in graphs.items():
        with progress_bar(console, f"Exporting to ONNX, {precision}") as progress:
            written = write_model(graph, tensors, folder / model_file(precision), progress)
        files[precision] = {file.name: file.stat().st_size for file in written}
    for file in (origin / name for name in TOKENIZER_FILES):
        if file.is_file():
            shutil.copy(file, folder)
    model.pack()
    with waiting(console, "Reading a text with the source model"):
        reference = Reference(model, read_passages(origin, model.config.max_positions))
    measured = {}
    for precision, sizes in files.items():
        with progress_bar(console, f"Comparing {precision} with the source model") as progress:
            measured[precision] = reference.compare(folder / model_file(precision), sum(sizes.values()), progress)
    write_json(folder / REPORT, reference.report(measured))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=source,
        vocab_size=model.config.vocab_size,
        num_layers=model.config.num_layers,
        num_kv_heads=model.config.num_kv_heads,
        head_dim=model.config.head_dim,
        max_length=model.config.max_positions,
        files=files,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    write_json(folder / MANIFEST, manifest)
