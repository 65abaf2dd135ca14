"""What `doctor` says of a machine that lacks something; the rest of the machine is the real one."""

from __future__ import annotations

import io
import socket
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from click.testing import CliRunner
from rich.console import Console

from tidewright.devices.cpu import baselines, build
from tidewright.launch import doctor
from tidewright.launch.cli import main
from tidewright.launch.doctor import Check, print_report, run_checks
from tidewright.launch.errors import TritonNotFoundError
from tidewright.launch.triton_install import TritonInstall

Usage = namedtuple("Usage", "total used free")


def by_name(ports: Mapping[int, str] = MappingProxyType({})) -> dict[str, Check]:
    return {check.name: check for check in run_checks(ports)}


def test_every_problem_comes_with_its_cure() -> None:
    checks = run_checks({8000: "HTTP"})
    assert {"Python", "libpython", "Triton", "torch", "GPU", "port 8000", "/dev/shm", "cache", "model"} <= {
        check.name for check in checks
    }
    assert all(check.detail for check in checks)
    assert all(check.fix for check in checks if check.status != "ok")


def test_a_package_that_every_command_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert by_name()["packages"].status == "ok"
    wanted = ["click>=8.1", "no-such-package>=1", 'torch>=2; extra == "server"', 'none-such; extra == "gateway"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    found = by_name()["packages"]
    assert (found.status, found.detail, found.fix) == (
        "fail",
        "missing: no-such-package",
        "pip install no-such-package",
    )


def test_no_gpu_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert by_name()["GPU"].status == "ok"


def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PYTHONS", ((4, 0), (4, 1)))
    assert by_name()["Python"].status == "fail"


def test_no_triton_and_no_libpython_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> TritonInstall:
        raise TritonNotFoundError("get one")

    monkeypatch.setattr(doctor, "find_triton", nothing)
    monkeypatch.setattr(doctor, "libpython_dirs", nothing)
    checks = by_name()
    assert (checks["Triton"].status, checks["Triton"].fix) == ("fail", "get one")
    assert checks["libpython"].status == "fail"


@pytest.mark.parametrize(
    ("from_wheel", "numpy", "status"),
    [(True, "1.26.4", "ok"), (True, "2.1.0", "fail"), (False, "2.1.0", "ok")],
)
def test_numpy_2_fails_with_the_wheel_only(
    monkeypatch: pytest.MonkeyPatch, from_wheel: bool, numpy: str, status: str
) -> None:
    install = TritonInstall(Path("/t/bin/tritonserver"), Path("/t"), None, from_wheel)
    monkeypatch.setattr(doctor, "find_triton", lambda: install)
    monkeypatch.setattr(doctor, "_version", lambda package: numpy)
    checks = by_name()
    assert checks["numpy"].status == status
    assert checks["Python backend"].status == "fail"


def test_a_missing_compiler_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    check = by_name()["C++ compiler"]
    assert (check.status, check.detail) == ("warn", "no no-such-compiler")
    assert "apt-get install g++" in check.fix


def test_what_quantization_gains_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name()["quantization"]
    assert (found.status, "int8: half the memory" in found.detail) == ("ok", True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(doctor, "_kernels_built_ahead", lambda: None)
    found = by_name()["quantization"]
    assert (found.status, "emulated" in found.detail) == ("warn", True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "NVIDIA A10")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (8, 6))
    assert by_name()["quantization"].detail.endswith("fp8: dequantized")


def test_where_kernels_are_built_ahead_no_compiler_is_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("tidewright.devices.cpu.build.PREBUILT", tmp_path)
    baseline = baselines.fitting(build.processor())[0]
    library = tmp_path / build._prebuilt_name(baseline, build._openmp_library())
    library.touch()
    checks = by_name()
    assert (checks["CPU kernels"].status, checks["CPU kernels"].detail) == ("ok", f"built ahead: {library}")
    assert "C++ compiler" not in checks


def test_a_port_in_use_is_noticed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["doctor", "--http-port", str(port)], env={"TIDEWRIGHT_GATEWAY_PORT": "0"})
        check = by_name({port: "HTTP"})[f"port {port}"]
    assert f"port {port}" in result.output
    assert "gateway" not in result.output.partition("port")[2].partition("/dev/shm")[0]
    assert check.status == "warn"
    assert "--http-port" in check.fix
    assert by_name({port: "HTTP"})[f"port {port}"].status == "ok"


def test_little_shared_memory_fails_and_little_disk_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    checks = by_name()
    assert (checks["/dev/shm"].status, checks["/dev/shm"].detail) == ("fail", "64 MiB")
    assert checks["cache"].status == "warn"


def test_a_cache_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIDEWRIGHT_CACHE", str(tmp_path / "file" / "cache"))
    assert by_name()["cache"].status == "fail"


def test_an_unprepared_model_is_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIDEWRIGHT_CACHE", str(tmp_path / "empty"))
    check = by_name()["model"]
    assert check.status == "warn"
    assert "tidewright prepare" in check.fix
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_command_ends_with_1_if_anything_failed(monkeypatch: pytest.MonkeyPatch, status: str, code: int) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda ports: [Check("thing", status, "found", "fix [it]")])
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == code
    assert "fix [it]" in result.output


def test_the_report_counts_failures() -> None:
    out = io.StringIO()
    print_report([Check("a", "ok", "x"), Check("b", "fail", "y", "z")], Console(file=out, width=100))
    assert "1 of 2 checks failed" in out.getvalue()
