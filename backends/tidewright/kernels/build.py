"""Compiles the C++ kernels once for this processor, keeps them in the cache folder, and loads them.

They run on the OpenMP threads of torch: two pools would fight for the cores. So they are linked to the very file that
torch has loaded.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch  # noqa: F401 - loads the OpenMP library that the kernels share

from tidewright.cache import cache_dir

_SOURCES = Path(__file__).parent / "cpu"
# No -ffast-math: it would undo the rounding tricks, and let infinities and NaN pass as numbers.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-Wno-psabi")
_TIMEOUT = 120  # seconds

logger = logging.getLogger(__name__)


class KernelBuildError(RuntimeError):
    """The kernels can't be compiled or loaded here. The message says why."""


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with a line in the log, where there is no C++ compiler that can make them."""
    try:
        return ctypes.CDLL(str(build()))
    except (KernelBuildError, OSError) as error:
        logger.warning("CPU kernels are off, torch's slower operations stand in: %s", error)
        return None


def build() -> Path:
    """The shared library, compiled with $CXX or g++ unless the cache folder has it.

    Raises:
        KernelBuildError: there is no compiler, it fails, or torch does not use OpenMP.
        OSError: the cache folder can't be written.
    """
    openmp = _openmp_library()
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    flags = _flags()
    sources = sorted(_SOURCES.iterdir())
    version = _run([*compiler, "--version"])
    # What -march=native depends on: a cache folder may be shared by different machines.
    features = _processor("flags", "Features")
    recipe = [*compiler, version, features, openmp.name, *flags, *(s.read_text() for s in sources)]
    folder = cache_dir() / "kernels"
    library = folder / f"{hashlib.sha256(chr(0).join(recipe).encode()).hexdigest()[:24]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # all ranks of a first start come at once
        if not library.is_file():
            _compile(compiler, flags, sources, openmp, library)
    finally:
        os.close(lock)
    return library


def _compile(compiler: list[str], flags: tuple[str, ...], sources: list[Path], openmp: Path, library: Path) -> None:
    logger.info("compiling the CPU kernels for this processor; only the first start does this, some 10 s")
    # Built beside its place and then renamed, so that another process sees all of it or nothing.
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = []
        for source in sources:
            if source.suffix == ".cpp":
                objects.append(f"{scratch}/{source.stem}.o")
                _run([*compiler, *flags, "-c", str(source), "-o", objects[-1]])
        # Without -fopenmp, which would add the compiler's own OpenMP library.
        built = f"{scratch}/{library.name}"
        _run([*compiler, "-shared", *objects, str(openmp), "-o", built])
        os.replace(built, library)


def _flags() -> tuple[str, ...]:
    # By vendor, not measured: AMD's cores multiply bfloat16 at full rate wherever they can, see vectors.h.
    return (*_FLAGS, "-DFAST_BF16_DOT") if _processor("vendor_id").endswith("AuthenticAMD") else _FLAGS


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    except FileNotFoundError:
        raise KernelBuildError(f"no C++ compiler {command[0]!r}; install g++, or set CXX") from None
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), f"exit code {error.returncode}")
        raise KernelBuildError(f"{command[0]} failed: {reason.strip()}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(f"{command[0]} failed: {error}") from None
    return done.stdout


def _openmp_library() -> Path:
    """The OpenMP library that torch brought into this process."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        raise KernelBuildError("they need Linux") from None
    found = re.search(r"(/\S.*/lib(?:gomp|iomp5|omp)\b[^/\n]*\.so[^/\n]*)$", maps, re.MULTILINE)
    if not found:
        raise KernelBuildError("torch uses no OpenMP here")
    return Path(found[1])


def _processor(*names: str) -> str:
    """The first line about the processor that begins with one of these names."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(names)), os.uname().machine)
