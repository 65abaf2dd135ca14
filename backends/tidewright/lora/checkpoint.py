"""Reads an adapter's folder: each projection's matrices, this rank's part of them, in the model's type.

Runs beside the engine's steps. Everything is checked before anything is kept, and nothing is unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from tidewright.cache import EMBEDDED_BASE, EMBEDDED_MODEL
from tidewright.distributed.sharding import Cut
from tidewright.kv_cache.budget import mib
from tidewright.lora.adapter import Adapter, LowRank, Update
from tidewright.lora.config import (
    CONFIG_FILE,
    AdapterConfig,
    AdapterError,
    ends_with,
    read_at_most,
    read_config,
    read_config_file,
)

log = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED = ("adapter_model.bin", "adapter_model.pt")
_WRAPPER = "base_model.model."
_HEADER = 2**22  # bytes of a safetensors file that are no numbers, generously
_WIDEST = 4  # bytes of a number
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Shape:
    """Of a projection: this rank's rows (outputs) and columns (inputs) of the weight."""

    rows: Cut
    columns: Cut


@dataclass(frozen=True)
class AdapterLimits:
    folder: Path  # adapters lie below it
    max_rank: int
    dtype: torch.dtype
    model: str = ""  # name of the model that is served; empty: nobody is warned of another base model
    memory: int = 0  # bytes for all adapters, on all ranks; 0: any number


def read_adapter(
    path: str, shapes: Mapping[str, Shape], limits: AdapterLimits, arrange: Callable[[str, LowRank], Update]
) -> Adapter:
    """`arrange`: what the device takes of a projection's part. Raises AdapterError."""
    try:
        folder = _below(limits.folder, limits.folder / path)
        if not folder.is_dir():
            raise AdapterError(f"{path} is not a folder")
        config_bytes = read_config_file(_file(limits.folder, folder, CONFIG_FILE))
        config = read_config(config_bytes)
        if limits.model and config.base_model:
            _warn_of_another(path, config.base_model, limits.model)
        if config.highest_rank > limits.max_rank:
            raise AdapterError(f"its rank is {config.highest_rank}, but max_lora_rank is {limits.max_rank}")
        file = _file(limits.folder, folder, WEIGHTS_FILE)
        size, most = file.stat().st_size, _largest(config.highest_rank, shapes)
        if size > most:
            raise AdapterError(f"{WEIGHTS_FILE} has {size} bytes, but rank {config.highest_rank} needs {most} at most")
        # To read it takes several times as much. Of the numbers in the file, all are on some rank.
        least = (size - _HEADER) // _WIDEST * limits.dtype.itemsize
        if limits.memory and least > limits.memory:
            needed = f"it takes {mib(least)} or more"
            raise AdapterError(f"{needed}, but there are {mib(limits.memory)} for all adapters (adapter_memory)")
        content = read_at_most(file, most)
    except OSError as error:
        raise AdapterError(f"{path} can't be read: {error.strerror or error}") from None
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise AdapterError(f"{WEIGHTS_FILE} is not a readable safetensors file: {error}") from None
    digest = hashlib.blake2b(config_bytes + b"\0", digest_size=16)
    digest.update(content)
    with torch.inference_mode():
        parts = _updates(tensors, config, shapes, limits.dtype)
        updates = {name: arrange(name, part) for name, part in parts}
    return Adapter(digest.hexdigest(), max(update.rank for update in updates.values()), updates)


@functools.lru_cache(maxsize=256)  # one that is read again and again is said once
def _warn_of_another(path: str, base: str, model: str) -> None:
    """Only shapes can tell what does not fit, and models of one family often have the same."""
    own = EMBEDDED_BASE if model == EMBEDDED_MODEL else _last_part(model)
    if _last_part(base) != own:
        what = "the adapter in %.200s was trained on %.200r, but the model here is %.200r: they may not fit"
        log.warning(what, path, base, model)


def _last_part(model: str) -> str:
    """Of a path, of a hub id, or of the folder that one was prepared in."""
    return re.split("/|--", model.rstrip("/"))[-1].lower()


def _below(root: Path, path: Path) -> Path:
    """The path without symbolic links. Raises AdapterError unless it exists and lies below `root`; or OSError."""
    try:
        root, resolved = root.resolve(strict=True), path.resolve()
        if resolved.is_relative_to(root):  # else what is there is nobody's business
            resolved = path.resolve(strict=True)
    except FileNotFoundError as error:
        raise AdapterError(f"there is no {error.filename}") from None
    except (RuntimeError, ValueError) as error:  # a loop of symbolic links, or NUL
        raise AdapterError(f"{path} can't be read: {error}") from None
    if not resolved.is_relative_to(root) or resolved == root:
        raise AdapterError(f"{path} is not below the allowed folder (adapter_folder)")
    return resolved


def _file(root: Path, folder: Path, name: str) -> Path:
    if not (folder / name).exists():
        pickled = next((other for other in _PICKLED if (folder / other).exists()), None)
        beside = f", only {pickled}, which is not read for it may run code" if pickled else ""
        raise AdapterError(f"the folder has no {name}{beside}")
    file = _below(root, folder / name)
    if not file.is_file():
        raise AdapterError(f"{name} is not a file")
    return file


def _largest(rank: int, shapes: Mapping[str, Shape]) -> int:
    numbers = sum(rank * (shape.rows.total + shape.columns.total) for shape in shapes.values())
    return _HEADER + numbers * _WIDEST


def _updates(
    tensors: Mapping[str, torch.Tensor], config: AdapterConfig, shapes: Mapping[str, Shape], dtype: torch.dtype
) -> Iterator[tuple[str, LowRank]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    modules: dict[str, str] = {}  # as PEFT names them
    for key, tensor in tensors.items():
        module, half = _split(key)
        name = module if module in shapes else f"model.{module}"  # an adapter of the model without its head
        if name not in shapes:
            raise AdapterError(f"it has weights for {module}, which the model does not have or does not adapt")
        if half in found.setdefault(name, {}):
            raise AdapterError(f"it has the weights of {module} twice")
        found[name][half] = tensor
        modules[name] = module
    if not found:
        raise AdapterError(f"{WEIGHTS_FILE} is empty")
    _check_complete(config, modules, shapes)
    for name, halves in sorted(found.items()):
        yield name, _update(modules[name], halves, shapes[name], config, dtype)


def _split(key: str) -> tuple[str, str]:
    """The module that a weight belongs to, and which half it is."""
    for half in ("lora_A", "lora_B"):
        # PEFT leaves the adapter's own name out, older releases may not.
        for end in (f".{half}.weight", f".{half}.default.weight"):
            if key.startswith(_WRAPPER) and key.endswith(end):
                return key[len(_WRAPPER) : -len(end)], half
    raise AdapterError(f"it has the weight {key!r}; only lora_A and lora_B of linear layers are served")


def _check_complete(config: AdapterConfig, modules: Mapping[str, str], shapes: Mapping[str, Shape]) -> None:
    for target in config.targets:
        if not any(ends_with(module, target) for module in modules.values()):
            raise AdapterError(f"{WEIGHTS_FILE} has no weights of the target module {target!r}")
        wanted = [name for name in shapes if ends_with(name, target)]
        if config.is_complete and (absent := next((name for name in wanted if name not in modules), None)):
            raise AdapterError(f"{WEIGHTS_FILE} has no weights of {absent}, a target module")


def _update(
    module: str, halves: Mapping[str, torch.Tensor], shape: Shape, config: AdapterConfig, dtype: torch.dtype
) -> LowRank:
    if len(halves) < 2:
        raise AdapterError(f"it has {next(iter(halves))} of {module}, but not the other half")
    rank, outputs, inputs = config.rank_of(module), shape.rows, shape.columns
    wanted = {"lora_A": (rank, inputs.total), "lora_B": (outputs.total, rank)}
    for half, dimensions in wanted.items():
        if tuple(halves[half].shape) != dimensions:
            raise AdapterError(
                f"{half} of {module} has the shape {tuple(halves[half].shape)}, but this model and the adapter's "
                f"configuration need {dimensions}: it may be of another base model"
            )
        if halves[half].dtype not in _TYPES:
            raise AdapterError(f"{half} of {module} has numbers of type {halves[half].dtype}, which is not served")
    a_RE = halves["lora_A"][:, inputs.slice].to(dtype, copy=True).contiguous()
    b_RF = halves["lora_B"][outputs.slice].t().to(dtype, copy=True, memory_format=torch.contiguous_format)
    for half, part in (("lora_A", a_RE), ("lora_B", b_RF)):
        if not bool(part.isfinite().all()):
            raise AdapterError(f"{half} of {module} has numbers that are not finite in {dtype}")
    return LowRank(a_RE, b_RF, config.scale_of(module), rank)
