"""`tidewright doctor`: looks at everything that serving needs, and says how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import socket
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from tidewright.cache import EMBEDDED_MODEL, MANIFEST, ModelNotPreparedError, cache_dir, find_prepared
from tidewright.launch.errors import TritonNotFoundError
from tidewright.launch.space import nearest_existing
from tidewright.launch.triton_install import find_triton, libpython_dirs
from tidewright.quantization.hardware import multiplies_float8, of_card, of_processor, summary

_PYTHONS = ((3, 10), (3, 13))
_SHARED_MEMORY = 256 << 20
_DISK = 1 << 30  # the embedded model takes 360 MB while it is made


@dataclass(frozen=True)
class Check:
    """One thing looked at. `fail` keeps a server from running, `warn` may."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def run_checks(ports: Mapping[int, str]) -> list[Check]:
    """All checks, in the order in which their fixes make sense. Starts no server. `ports`: what each is for."""
    parts: tuple[Callable[[], Iterator[Check]], ...] = (
        _python,
        _packages,
        _triton,
        _torch,
        _compiler,
        _quantization,
        partial(_ports, ports),
        _shared_memory,
        _cache,
        _embedded_model,
    )
    return [check for part in parts for check in part()]


def print_report(checks: list[Check], console: Console | None = None) -> None:
    """A table of the checks, and one line that sums them up."""
    console = console or Console()
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}
    table = Table("check", "", "found", "what to do", box=None, pad_edge=False)
    table.columns[2].overflow = table.columns[3].overflow = "fold"
    for check in checks:
        # Texts may hold [brackets], which are not markup.
        found, fix = (text.replace("[", r"\[") for text in (check.detail, check.fix))
        table.add_row(check.name, marks[check.status], found, fix)
    console.print(table)
    failed = sum(check.status == "fail" for check in checks)
    console.print(f"\n{failed} of {len(checks)} checks failed" if failed else "\nReady to serve: tidewright serve")


def _python() -> Iterator[Check]:
    version = sys.version_info[:2]
    text = f"{sys.version.split()[0]} ({sys.executable})"
    if _PYTHONS[0] <= version <= _PYTHONS[1]:
        yield Check("Python", "ok", text)
    else:
        yield Check("Python", "fail", text, "use Python 3.10 to 3.13")
    try:
        folders = libpython_dirs()
    except TritonNotFoundError as error:
        yield Check("libpython", "fail", "no shared library", str(error))
    else:
        built = "built shared" if sysconfig.get_config_var("Py_ENABLE_SHARED") else "built static, library found apart"
        yield Check("libpython", "ok", f"{built}, in {folders[0] if folders else 'the system library path'}")


def _packages() -> Iterator[Check]:
    """What every command needs; the extras have checks of their own."""
    missing = []
    for requirement in importlib.metadata.requires("tidewright") or ():
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        if "extra ==" in requirement:
            continue
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Check("packages", "fail", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    else:
        yield Check("packages", "ok", "all that the commands need")


def _triton() -> Iterator[Check]:
    try:
        install = find_triton()
    except TritonNotFoundError as error:
        yield Check("Triton", "fail", "no tritonserver", str(error))
        return
    if install.from_wheel:
        yield Check("Triton", "ok", f"{install.binary} (wheel nvidia-pytriton {_version('nvidia-pytriton')})")
    else:
        # NVIDIA's containers name their release in the environment; the binary tells it only once started.
        yield Check("Triton", "ok", f"{install.binary} {os.environ.get('TRITON_SERVER_VERSION', '')}".strip())
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if install.stub is None:
        fix = "use a Python from 3.10 to 3.13, or the one of NVIDIA's container"
        yield Check("Python backend", "fail", f"no stub for Python {python}", fix)
    else:
        yield Check("Python backend", "ok", f"stub for Python {python}")
    numpy = _version("numpy")
    if install.from_wheel and int(numpy.partition(".")[0]) >= 2:
        yield Check("numpy", "fail", f"{numpy}: tensors come out empty in the wheel's Triton", "pip install 'numpy<2'")
    else:
        yield Check("numpy", "ok", numpy)


def _torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("torch", "fail", f"can't be imported: {error}", "pip install 'tidewright[server]'")
        return
    yield Check("torch", "ok", torch.__version__)
    if not torch.cuda.is_available():
        yield Check("GPU", "ok", "none: the model runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Check("GPU", "ok", f"cuda:{index} {device.name}, {device.total_memory / 2**30:.0f} GiB")


def _compiler() -> Iterator[Check]:
    if library := _kernels_built_ahead():
        yield Check("CPU kernels", "ok", f"built ahead: {library}")
    elif found := _found_compiler():
        yield Check("C++ compiler", "ok", found)
    else:
        fix = "apt-get install g++, or set CXX: a model on a CPU is half as fast without it"
        yield Check("C++ compiler", "warn", f"no {_compiler_name()}", fix)


def _kernels_built_ahead() -> Path | None:
    """As in an image."""
    try:
        from tidewright.devices.cpu import build
        from tidewright.devices.cpu.baselines import fitting

        return next(filter(None, map(build.prebuilt, fitting(build.processor()))), None)
    except (ImportError, OSError, RuntimeError):  # without torch, of which another check tells
        return None


def _quantization() -> Iterator[Check]:
    """What `--quantization` gains where the model would run by default."""
    try:
        import torch

        from tidewright.devices.cpu.build import processor
    except (ImportError, OSError):  # of which another check tells
        return
    if torch.cuda.is_available():
        has_float8 = multiplies_float8(torch.cuda.get_device_capability(0))
        yield Check("quantization", "ok", summary(of_card(torch.cuda.get_device_name(0), has_float8)))
        return
    has_kernels = bool(_kernels_built_ahead() or _found_compiler())
    found = summary(of_processor(processor().features, has_kernels))
    if has_kernels:
        yield Check("quantization", "ok", found)
    else:
        yield Check("quantization", "warn", found, "apt-get install g++, or set CXX")


def _found_compiler() -> str | None:
    return shutil.which(_compiler_name())


def _compiler_name() -> str:
    return shlex.split(os.environ.get("CXX") or "g++")[0]


def _ports(ports: Mapping[int, str]) -> Iterator[Check]:
    for port, use in ports.items():
        with socket.socket() as probe:
            # As servers do: a connection that is only lingering is in nobody's way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                fix = f"end what listens there, or: tidewright serve --{use.lower()}-port N"
                yield Check(f"port {port}", "warn", f"in use ({use})", fix)
            else:
                yield Check(f"port {port}", "ok", f"free ({use})")


def _shared_memory() -> Iterator[Check]:
    size = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    text = f"{size >> 20} MiB"
    if size >= _SHARED_MEMORY:
        yield Check("/dev/shm", "ok", text)
    else:
        fix = "give it at least 256 MiB: docker run --shm-size=1g, or a memory-backed emptyDir in Kubernetes"
        yield Check("/dev/shm", "fail", text, fix)


def _cache() -> Iterator[Check]:
    folder = cache_dir()
    existing = nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        # What it holds can be served, as from a read-only volume.
        status: Literal["warn", "fail"] = "warn" if any(folder.glob(f"models/*/{MANIFEST}")) else "fail"
        yield Check(
            "cache", status, f"{folder} can't be written", "to prepare models, set TIDEWRIGHT_CACHE to one that can"
        )
        return
    free = shutil.disk_usage(existing).free
    text = f"{folder}, {free / 2**30:.1f} GiB free"
    if free >= _DISK:
        yield Check("cache", "ok", text)
    else:
        yield Check("cache", "warn", text, "free some space, or set TIDEWRIGHT_CACHE to a larger disk")


def _embedded_model() -> Iterator[Check]:
    try:
        yield Check("model", "ok", f"{EMBEDDED_MODEL} is prepared ({find_prepared(EMBEDDED_MODEL)})")
    except ModelNotPreparedError:
        yield Check("model", "warn", f"{EMBEDDED_MODEL} is not prepared", "tidewright prepare (serve does it, too)")


def _version(package: str) -> str:
    return importlib.metadata.version(package)
