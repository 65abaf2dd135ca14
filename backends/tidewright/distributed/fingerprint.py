"""Tells whether two hosts have the same model, from a few megabytes of its files. No torch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SAMPLE = 4096  # bytes: a page
SAMPLES = 1024  # of all files together; a slow disk takes a millisecond or so for each
LONGEST_HEADER = 2**24  # bytes; of a file that has a longer one, only samples are read


def files_fingerprint(folder: str | Path) -> str:
    """Of config.json, and of the names and sizes of the weight files."""
    return _files(Path(folder)).hexdigest()[:32]


def model_fingerprint(folder: str | Path) -> str:
    """Of the same, of each weight file's header, and of pages at equal distances in all of them.

    Two models of the same shape, such as two fine-tunes of one, differ nearly everywhere, so pages do. It shows every
    difference in a stretch of 1/1024 of the weights, and in models of up to 4 MiB every byte; not a bit that a disk has
    flipped. Raises OSError.
    """
    digest = _files(Path(folder))
    files = _weights(Path(folder))
    stride = max(sum(size for _, size in files) // SAMPLES, SAMPLE)
    for file, size in files:
        with file.open("rb", buffering=0) as opened:
            descriptor = opened.fileno()
            header = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            if header <= LONGEST_HEADER:
                digest.update(os.pread(descriptor, header, 8))
            # The end is always among them: of a copy that was cut short and preallocated, it is zeros.
            for start in (*range(0, size, stride), max(size - SAMPLE, 0)):
                digest.update(os.pread(descriptor, SAMPLE, start))
    return digest.hexdigest()[:32]


def _files(folder: Path) -> hashlib._Hash:
    named = [(file.name, size) for file, size in _weights(folder)]
    return hashlib.sha256((folder / "config.json").read_bytes() + repr(named).encode())


def _weights(folder: Path) -> list[tuple[Path, int]]:
    found = [file for pattern in ("*.safetensors", "*.gguf") for file in folder.glob(pattern)]
    return sorted((file, file.stat().st_size) for file in found)
