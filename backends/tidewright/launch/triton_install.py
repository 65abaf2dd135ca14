"""Finds a tritonserver on this machine and lays out the backend folder that it is started with.

Two kinds exist: NVIDIA's container (or anything installed like it), and the PyPI wheel nvidia-pytriton.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tidewright.launch.errors import TritonNotFoundError

_CONTAINER_ROOT = Path("/opt/tritonserver")
_STUB = "triton_python_backend_stub"
_LIBRARY = "libtriton_python.so"
_UTILS = "triton_python_backend_utils.py"


@dataclass(frozen=True)
class TritonInstall:
    """A tritonserver with its Python backend."""

    binary: Path
    python_backend: Path
    """The folder with libtriton_python.so."""
    stub: Path | None
    """The Python backend's worker for the running Python; None: there is none for this version."""
    from_wheel: bool


def find_triton() -> TritonInstall:
    """The tritonserver to use: the one on PATH, the container's, or the wheel's, in this order.

    Raises:
        TritonNotFoundError: says how to get one.
    """
    on_path = shutil.which("tritonserver")
    candidates = [Path(on_path).resolve()] if on_path else []
    candidates.append(_CONTAINER_ROOT / "bin" / "tritonserver")
    for binary in candidates:
        backend = binary.parent.parent / "backends" / "python"
        if _is_executable(binary) and (backend / _LIBRARY).is_file():
            return _describe(binary, backend)
    if (root := _wheel_root()) is not None:
        return _describe(root / "bin" / "tritonserver", root / "backends" / "python")
    raise TritonNotFoundError(
        "no tritonserver with a Python backend found (looked on PATH, in /opt/tritonserver "
        "and for the wheel); run: pip install 'tidewright[triton-wheel]', or work in NVIDIA's Triton container"
    )


def assemble_backend_dir(install: TritonInstall, target: Path) -> Path:
    """Fill `target` for --backend-directory: Triton's Python backend, and this package as `tidewright`.

    Raises:
        TritonNotFoundError: the server has no stub for the running Python.
    """
    if install.stub is None:
        raise TritonNotFoundError(
            f"{install.binary} has no Python backend for Python {_python_version()}; "
            "use a Python from 3.10 to 3.13, or the one of NVIDIA's container"
        )
    target.mkdir(parents=True, exist_ok=True)
    _replace_link(target / "tidewright", Path(__file__).resolve().parent.parent)
    python = target / "python"
    python.mkdir(exist_ok=True)
    # Triton refuses a library that a link takes out of the backend folder; the stub, on the other hand, must be a
    # link: it finds its own libraries beside its real path.
    shutil.copy2(install.python_backend / _LIBRARY, python / _LIBRARY)
    _replace_link(python / _UTILS, install.python_backend / _UTILS)
    _replace_link(python / _STUB, install.stub)
    return target


def libpython_dirs() -> list[str]:
    """Folders to put on LD_LIBRARY_PATH so that the stub finds libpython; none where the loader knows it.

    Raises:
        TritonNotFoundError: the running Python has no shared library, so no stub can start.
    """
    name = f"libpython{_python_version()}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib"]
    for folder in folders:
        if folder and (Path(folder) / name).is_file():
            return [str(folder)]
    try:
        ctypes.CDLL(name)
    except OSError:
        raise TritonNotFoundError(
            f"Triton's Python backend needs {name}, which this Python ({sys.executable}) lacks: it was built "
            "without a shared library. Use a Python built with --enable-shared, or install your "
            f"distribution's libpython{_python_version()} package."
        ) from None
    return []


def _describe(binary: Path, backend: Path) -> TritonInstall:
    # The wheel's own script and binary may also stand on PATH: its layout gives it away.
    stubs = binary.parent.parent / "python_backend_stubs"
    stub = stubs / _python_version() / _STUB if stubs.is_dir() else backend / _STUB
    return TritonInstall(
        binary=binary,
        python_backend=backend,
        stub=stub if _is_executable(stub) and _links_this_python(stub) else None,
        from_wheel=stubs.is_dir(),
    )


def _wheel_root() -> Path | None:
    """Where the wheel keeps its tritonserver; found without an import, which would start things."""
    spec = importlib.util.find_spec("pytriton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        root = Path(folder) / "tritonserver"
        if (root / "bin" / "tritonserver").is_file() and (root / "backends" / "python" / _LIBRARY).is_file():
            return root
    return None


def _is_executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _links_this_python(stub: Path) -> bool:
    """Whether the stub names the running Python's library: a container's stub fits one Python only."""
    return f"libpython{_python_version()}.so".encode() in stub.read_bytes()


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _replace_link(link: Path, to: Path) -> None:
    """Point `link` at `to`, whatever it pointed at before; in one rename, as servers may start at once."""
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(to)
    fresh.replace(link)
