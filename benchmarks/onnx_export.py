"""Exported models side by side: start, memory, speed, and what the batch does to a request's logits.

`python -m benchmarks.onnx_export FOLDER`; FOLDER comes from `tidewright export-onnx --precision both`.
Beside them stands what onnxruntime's quantize_dynamic makes of the float32 model: int8, a scale a channel.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil

from tidewright.onnx_export.manifest import PRECISIONS, model_file, read_manifest
from tidewright.onnx_export.session import OnnxDecoder

Result = TypeVar("Result")
PROMPT, DECODED = 256, 32
FIGURES = ("size MB", "start s", "memory MB", f"prefill {PROMPT} ms", "decode tok/s", "change by batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    manifest = read_manifest(options.folder)
    if manifest is None or set(PRECISIONS) - manifest.files.keys():
        parser.error(f"{options.folder} lacks models: tidewright export-onnx --precision both --output FOLDER")
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: options.folder / model_file(name) for name in ("float32", "int8")}
        files["quantize_dynamic"] = _quantize_dynamic(files["float32"], Path(scratch))
        rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in files}
        for _ in range(options.rounds):  # by turns: what else the machine does meets all of them
            for name, file in files.items():
                rounds[name].append(_measure_apart(file, manifest.vocab_size, options.threads))
    print(f"median of {options.rounds} rounds, {options.threads} thread(s)")
    print(f"{'':17}" + "".join(f"{figure:>17}" for figure in FIGURES))
    for name, measured in rounds.items():
        medians = [statistics.median(values) for values in zip(*measured, strict=True)]
        print(f"{name:17}" + "".join(f"{value:>17.5g}" for value in medians))


def _quantize_dynamic(file: Path, scratch: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kinds = ["MatMul", "Gemm", "Gather"]  # with Gather: else a tied embedding is there twice
    target, started = scratch / "dynamic.onnx", time.monotonic()
    quantize_dynamic(file, target, kinds, per_channel=True, weight_type=QuantType.QInt8)
    print(f"quantize_dynamic took {time.monotonic() - started:.1f} s")
    return target


def _measure_apart(file: Path, vocab_size: int, threads: int) -> tuple[float, ...]:
    """In a process of its own: memory once taken by a model would hide the next one's."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(file, vocab_size, threads, sender))
    process.start()
    sender.close()
    figures: tuple[float, ...] = receiver.recv()
    process.join()
    return figures


def _measure(file: Path, vocab_size: int, threads: int, sender: Connection) -> None:
    size = sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*"))
    before = psutil.Process().memory_info().rss
    start_s, decoder = _timed(lambda: OnnxDecoder(file, threads))
    prompts = np.random.default_rng(0).integers(3, vocab_size, (3, PROMPT)).tolist()
    decoder.begin([prompts[1][:16]])
    memory = psutil.Process().memory_info().rss - before
    prefill_s, sequences = _timed(lambda: decoder.begin(prompts[:1]))
    decode_s, _ = _timed(lambda: [sequences.add(sequences.logits_BV.argmax(axis=-1)) for _ in range(DECODED)])
    alone_V = decoder.begin([prompts[0][:20]]).logits_BV[0]
    change = np.abs(decoder.begin([prompts[0][:20], prompts[1][:60]]).logits_BV[0] - alone_V).max()
    sender.send((size / 1e6, start_s, memory / 1e6, prefill_s * 1e3, DECODED / decode_s, float(change)))


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
