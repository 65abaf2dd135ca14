"""Finding a tritonserver in layouts made for the purpose, and in the real one of this environment."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from tidewright.launch import triton_install
from tidewright.launch.errors import TritonNotFoundError
from tidewright.launch.triton_install import TritonInstall, assemble_backend_dir, find_triton, libpython_dirs

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def make_file(path: Path, content: str = "", mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(mode)
    return path


@pytest.fixture
def container(tmp_path: Path) -> Path:
    """What stands in /opt/tritonserver."""
    root = tmp_path / "tritonserver"
    make_file(root / "bin" / "tritonserver")
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        make_file(root / "backends" / "python" / name)
    make_file(root / "backends" / "python" / "triton_python_backend_stub", f"needs libpython{PYTHON}.so.1.0")
    return root


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(triton_install, "_CONTAINER_ROOT", tmp_path / "none")


def test_the_wheel_is_found_without_an_import(tmp_path: Path) -> None:
    pytest.importorskip("pytriton.tritonserver", reason="needs the wheel", exc_type=ImportError)
    sys.modules.pop("pytriton", None)
    install = find_triton()
    assert "pytriton" not in sys.modules
    assert install.from_wheel
    assert install.stub is not None
    folder = assemble_backend_dir(install, tmp_path / "backends")
    assert {path.name for path in (folder / "python").iterdir()} == {
        "libtriton_python.so",
        "triton_python_backend_utils.py",
        "triton_python_backend_stub",
    }
    assert (folder / "python" / "triton_python_backend_stub").resolve() == install.stub.resolve()
    assert (folder / "tidewright" / "launch" / "triton_install.py").is_file()


def test_the_container_is_found_by_path_and_by_place(
    container: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend = container / "backends" / "python"
    expected = TritonInstall(
        container / "bin" / "tritonserver", backend, backend / "triton_python_backend_stub", from_wheel=False
    )
    with monkeypatch.context() as patch:
        patch.setattr(triton_install, "_CONTAINER_ROOT", container)
        assert find_triton() == expected
    monkeypatch.setenv("PATH", str(container / "bin"))
    assert find_triton() == expected
    folder = assemble_backend_dir(expected, tmp_path / "backends")
    assert (folder / "python" / "triton_python_backend_stub").resolve() == backend / "triton_python_backend_stub"
    # Triton refuses a library that a link takes out of the backend folder.
    assert not (folder / "python" / "libtriton_python.so").is_symlink()


def test_a_folder_assembled_before_is_brought_up_to_date(container: Path, tmp_path: Path) -> None:
    install = TritonInstall(
        container / "bin" / "tritonserver",
        container / "backends" / "python",
        container / "backends" / "python" / "triton_python_backend_stub",
        from_wheel=True,
    )
    folder = assemble_backend_dir(install, tmp_path / "backends")
    (folder / "python" / "triton_python_backend_stub").unlink()
    (folder / "python" / "triton_python_backend_stub").symlink_to("/gone")
    assemble_backend_dir(install, folder)
    assert (folder / "python" / "triton_python_backend_stub").resolve() == install.stub


def test_a_stub_of_another_python_is_none(container: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_file(container / "backends" / "python" / "triton_python_backend_stub", "needs libpython3.99.so.1.0")
    monkeypatch.setattr(triton_install, "_CONTAINER_ROOT", container)
    install = find_triton()
    assert install.stub is None
    with pytest.raises(TritonNotFoundError, match=f"no Python backend for Python {PYTHON}"):
        assemble_backend_dir(install, tmp_path / "backends")


def test_a_server_without_python_backend_is_passed_over(
    container: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lone = make_file(tmp_path / "lone" / "bin" / "tritonserver")
    monkeypatch.setenv("PATH", str(lone.parent))
    monkeypatch.setattr(triton_install, "_CONTAINER_ROOT", container)
    assert find_triton().binary == container / "bin" / "tritonserver"


def test_no_triton_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_install, "_wheel_root", lambda: None)
    with pytest.raises(TritonNotFoundError, match=r"pip install 'tidewright\[triton-wheel\]'"):
        find_triton()


def test_a_python_without_shared_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: "/nowhere")
    monkeypatch.setattr(sys, "base_prefix", "/nowhere")

    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    with pytest.raises(TritonNotFoundError, match="--enable-shared"):
        libpython_dirs()


def test_a_library_known_to_the_loader_needs_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)
    monkeypatch.setattr(sys, "base_prefix", "/nowhere")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert libpython_dirs() == []
