"""`report.json` of a quantized folder: its size, how long it loads, and how close it comes to its source."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from tidewright.engine.messages import EngineConfig
from tidewright.engine.model_runner import ModelRunner
from tidewright.quantization.quality import WINDOW, Extent, Quality, measure

REPORT = "report.json"
TEXT = Path(__file__).parent / "texts" / "time_machine.txt"
"""H. G. Wells, The Time Machine, 1895, chapters I to X; calibration never sees it."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    scheme: str
    dtype: str
    """Of the source, and of what is not quantized."""
    bytes: int
    source_bytes: int
    load_seconds: float
    source_load_seconds: float
    quality: Quality


def make_reports(
    source: Path,
    folders: Mapping[str, Path],
    on_progress: Callable[[int, int], None],
    extent: Extent | None = None,
    dtype: str = "bfloat16",
) -> dict[str, Report]:
    """Of folders by the names of their schemes: all are served in this process, as the engine would.

    Raises what `ModelRunner` does.
    """
    began, source_runner = time.perf_counter(), _serve(source, dtype)
    seconds, runners = {"": time.perf_counter() - began}, {}
    for scheme, folder in folders.items():
        began, runners[scheme] = time.perf_counter(), _serve(folder, dtype)
        seconds[scheme] = time.perf_counter() - began
    measured = measure(source_runner, runners, read_text(source), extent or Extent(), on_progress)
    return {
        scheme: Report(
            scheme=scheme,
            dtype=dtype,
            bytes=weight_bytes(folder),
            source_bytes=weight_bytes(source),
            load_seconds=seconds[scheme],
            source_load_seconds=seconds[""],
            quality=measured[scheme],
        )
        for scheme, folder in folders.items()
    }


def _serve(folder: Path, dtype: str) -> ModelRunner:
    config = EngineConfig(
        model_dir=str(folder),
        dtype=dtype,
        kv_cache_memory="256MiB",
        max_model_len=WINDOW,
        max_batched_tokens=WINDOW,
        max_running=1,
    )
    return ModelRunner(config)


def read_text(folder: Path) -> list[int]:
    """Token ids of the text, by that model's tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    ids: list[int] = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    return ids


def weight_bytes(folder: Path) -> int:
    found = list(folder.glob("*.safetensors")) or list(folder.glob("*.gguf"))
    return sum(file.stat().st_size for file in found)
