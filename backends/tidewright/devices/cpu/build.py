"""Finds or makes the shared library of the C++ kernels that fits this processor, and loads it.

The first of: one that was built ahead for a baseline of the processor (in an image, which has no compiler); one that is
compiled for this very processor, once, and kept in the cache folder.

The kernels run on the OpenMP threads of torch: two pools would fight for the cores. So they are linked to the very file
that torch has loaded.
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
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch  # noqa: F401 - loads the OpenMP library that the kernels share

from tidewright.cache import cache_dir
from tidewright.cores import usable_threads
from tidewright.devices.cpu.baselines import AMD, BASELINES, FAST_BF16_DOT, Baseline, Processor, fitting

CHOICE_VARIABLE = "TIDEWRIGHT_KERNELS"
AUTO, NATIVE, NONE = "auto", "native", "none"
PREBUILT = Path(__file__).parent / "prebuilt"
"""Where an image has its builds for baselines."""
_SOURCES = Path(__file__).parent / "source"
# No -ffast-math: it would undo the rounding tricks, and let infinities and NaN pass as numbers.
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-Wno-psabi")
_TIMEOUT = 600  # seconds; some on an idle core are enough for a source, but cores may be far from idle

logger = logging.getLogger(__name__)


class KernelBuildError(RuntimeError):
    """The kernels can't be compiled or loaded here. The message says why."""


class KernelChoiceError(ValueError):
    """TIDEWRIGHT_KERNELS asks for what there is not."""


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The kernels that $TIDEWRIGHT_KERNELS asks for; None, with a line in the log, if this processor has none.

    Raises:
        KernelChoiceError: $TIDEWRIGHT_KERNELS has an unknown value, or names a baseline that this processor can't run.
    """
    choice = os.environ.get(CHOICE_VARIABLE) or AUTO
    baselines = _candidates(choice)
    if choice == NONE:
        return None
    try:
        for baseline in baselines:
            if file := prebuilt(baseline):
                logger.info("CPU kernels: %s", file)
                return ctypes.CDLL(str(file))
        if choice not in (AUTO, NATIVE):
            raise KernelBuildError(f"{choice} is not built; run: python -m tidewright.devices.cpu {choice}")
        return ctypes.CDLL(str(build()))
    except (KernelBuildError, OSError) as error:
        logger.warning("CPU kernels are off, torch's slower operations stand in: %s", error)
        return None


def _candidates(choice: str) -> list[Baseline]:
    """The baselines to look for, the fastest first. Raises KernelChoiceError."""
    if choice == AUTO:
        return fitting(processor())
    if choice in (NATIVE, NONE):
        return []
    named = {baseline.name: baseline for baseline in BASELINES}
    if choice not in named:
        raise KernelChoiceError(f"{CHOICE_VARIABLE}={choice!r} is none of {', '.join((AUTO, NATIVE, NONE, *named))}")
    if not named[choice].runs_on(processor()):
        raise KernelChoiceError(f"{CHOICE_VARIABLE}={choice}: this processor lacks instructions that it uses")
    return [named[choice]]


def prebuilt(baseline: Baseline) -> Path | None:
    """Its library, if it was built from these sources for the OpenMP library that torch has here.

    Raises KernelBuildError, if torch does not use OpenMP.
    """
    name = _prebuilt_name(baseline, _openmp_library())
    return next((file for folder in (PREBUILT, cache_dir() / "kernels") if (file := folder / name).is_file()), None)


def build_ahead(baseline: Baseline, folder: Path) -> Path:
    """The library for a baseline, compiled unless the folder has it. Raises as `build`."""
    openmp = _openmp_library()
    return _made(folder / _prebuilt_name(baseline, openmp), (*_FLAGS, *baseline.flags), openmp)


def build() -> Path:
    """The library for this very processor, compiled with $CXX or g++ unless the cache folder has it.

    Raises:
        KernelBuildError: there is no compiler, it fails, or torch does not use OpenMP.
        OSError: the cache folder can't be written.
    """
    openmp = _openmp_library()
    compiler = _compiler()
    flags = _native_flags()
    version = _run([*compiler, "--version"])
    # What -march=native depends on: a cache folder may be shared by different machines.
    features = " ".join(sorted(processor().features))
    digest = _digest(*compiler, version, features, _name_to_link(openmp), *flags)
    return _made(cache_dir() / "kernels" / f"{digest}.so", flags, openmp)


def processor() -> Processor:
    """The one at hand."""
    texts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        texts.setdefault(name.strip(), value.strip())
    features = texts.get("flags") or texts.get("Features") or ""
    return Processor(os.uname().machine, texts.get("vendor_id", ""), frozenset(features.split()))


def _made(library: Path, flags: Sequence[str], openmp: Path) -> Path:
    """`library`, compiled unless it exists. Raises as `build`."""
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(library.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # all ranks of a first start come at once
        if not library.is_file():
            _compile(_compiler(), flags, openmp, library)
    finally:
        os.close(lock)
    return library


def _compile(compiler: list[str], flags: Sequence[str], openmp: Path, library: Path) -> None:
    logger.info("compiling the CPU kernels; only the first start does this, some 10 s")
    sources = [source for source in _sources() if source.suffix == ".cpp"]
    # An engine that took too long to start is killed, and the next one goes on with the objects that were ready.
    scratch = library.with_suffix(".parts")
    scratch.mkdir(exist_ok=True)
    try:
        with ThreadPoolExecutor(usable_threads()) as pool:
            objects = list(pool.map(lambda source: _object(compiler, flags, source, scratch), sources))
        # Beside its place and then renamed, so that another process sees all of it or nothing. Without -fopenmp,
        # which would add the compiler's own OpenMP library.
        built = scratch / library.name
        _run([*compiler, "-shared", *map(str, objects), str(openmp), "-o", str(built)])
        built.replace(library)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _object(compiler: list[str], flags: Sequence[str], source: Path, folder: Path) -> Path:
    """Compiled unless the folder has it."""
    made = folder / f"{source.stem}.o"
    if not made.exists():
        # Not the name that the compiler of an engine that was killed, which goes on alone, may be writing to.
        unfinished = folder / f"{source.stem}.{os.getpid()}.unfinished"
        _run([*compiler, *flags, "-c", str(source), "-o", str(unfinished)])
        unfinished.replace(made)
    return made


def _native_flags() -> tuple[str, ...]:
    flags = (*_FLAGS, "-march=native")
    return (*flags, FAST_BF16_DOT) if processor().vendor == AMD else flags


def _prebuilt_name(baseline: Baseline, openmp: Path) -> str:
    """Not of the compiler: where the library is loaded there may be none."""
    return f"{baseline.name}-{_digest(_name_to_link(openmp), *_FLAGS, *baseline.flags)}.so"


def _name_to_link(openmp: Path) -> str:
    """What a library that is linked to it asks the loader for: libgomp.so.1, which may be a file libgomp.so.1.0.0."""
    return re.sub(r"(\.so\.\d+)\..*", r"\1", openmp.name)


def _digest(*recipe: str) -> str:
    """Of what a library is made from: these things and the sources."""
    text = "\0".join((*recipe, *(source.read_text() for source in _sources())))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _sources() -> list[Path]:
    return sorted(_SOURCES.iterdir())


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


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
