"""devices/cpu/build.py in processes of its own: what is loaded, shared and compiled there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tidewright.devices.cpu import build
from tidewright.engine.torch_import import SPINS

OPENMP = """
import re
from pathlib import Path
from tidewright.engine.torch_import import importing_torch
with importing_torch():
    import torch
from tidewright.devices.cpu.build import load_library
library = load_library()
assert library
found = re.findall(r"/\\S*lib(?:gomp|iomp5|omp)\\S*", Path("/proc/self/maps").read_text())
print(len(set(found)), library.omp_get_max_threads(), end=" ")
torch.set_num_threads(torch.get_num_threads() + 3)
print(library.omp_get_max_threads() - torch.get_num_threads())
"""
BUILD = "from tidewright.devices.cpu.build import build; print(build())"
LOAD = """
import logging
logging.basicConfig()
import torch
from tidewright.devices.registry import make_device
from tidewright.devices.cpu.linear import CpuLinear
from tidewright.devices.cpu.kernels import kernels_of
assert kernels_of(torch.float32) is None
print(type(make_device("cpu", "auto", 16, torch.float32, 64).attention).__name__)
x, w = torch.randn(3, 8), torch.randn(5, 8)
for dtype in (torch.float32, torch.bfloat16):
    linear = CpuLinear(5, 8)
    linear.weight.data = w.to(dtype)
    linear.finish()
    torch.testing.assert_close(linear.multiply(x.to(dtype), None), x.to(dtype) @ w.to(dtype).T)
"""


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def output(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return out.strip(), err.strip()


def test_one_openmp_library_serves_torch_and_the_kernels() -> None:
    out, settings = output(start(OPENMP, OMP_NUM_THREADS="2", OMP_DISPLAY_ENV="verbose"))
    libraries, threads, difference = out.split()
    assert (libraries, threads, difference) == ("1", "2", "0")
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in settings


@pytest.mark.heavy
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    # Without optimization, which takes most of a compilation.
    compiler = tmp_path / "quick"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX") or "g++"} "$@" -O0\n')
    compiler.chmod(0o755)
    environment = {"TIDEWRIGHT_CACHE": str(tmp_path), "CXX": str(compiler)}
    both = [start(BUILD, **environment) for _ in range(2)]
    first, second = (output(process)[0] for process in both)
    assert first == second
    assert [str(file) for file in (tmp_path / "kernels").iterdir()] == [first]
    built = Path(first).stat().st_mtime_ns
    assert output(start(BUILD, **environment))[0] == first
    assert Path(first).stat().st_mtime_ns == built


def test_without_a_compiler_torch_stands_in(tmp_path: Path) -> None:
    out, err = output(start(LOAD, CXX="/nonexistent", TIDEWRIGHT_CACHE=str(tmp_path)))
    assert out == "ReferenceAttention"
    assert len(err.splitlines()) == 1
    assert "no C++ compiler '/nonexistent'; install g++, or set CXX" in err


def test_a_compiler_that_fails_is_named(tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "cpu.cpp:1: error: I am tired" >&2; exit 1\n')
    compiler.chmod(0o755)
    _, err = output(start(LOAD, CXX=str(compiler), TIDEWRIGHT_CACHE=str(tmp_path)))
    assert f"{compiler} failed: cpu.cpp:1: error: I am tired" in err
    assert list((tmp_path / "kernels").iterdir()) == []


@pytest.mark.heavy
def test_a_build_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """As when the engine is killed for it, which takes too long to start on cores that others use."""
    compiler, compiled, is_slow = tmp_path / "quick", tmp_path / "compiled", tmp_path / "slow"
    *others, last = (source.stem for source in build._sources() if source.suffix == ".cpp")  # as one core takes them
    compiler.write_text(f"""#!/bin/sh
case "$*" in *{last}.cpp*) [ -e {is_slow} ] && is_killed=1;; esac
case "$*" in *.cpp*) echo "$*" >> {compiled};; esac
while [ "$is_killed" ] && [ -e {is_slow} ]; do sleep 0.1; done
[ "$is_killed" ] && exit 1
exec {os.environ.get("CXX") or "g++"} "$@" -O0
""")
    compiler.chmod(0o755)
    is_slow.touch()
    environment = {"TIDEWRIGHT_CACHE": str(tmp_path), "CXX": str(compiler)}
    slow, parts = start(BUILD, **environment), tmp_path / "kernels"

    def is_at_the_last() -> bool:
        made = {file.stem for file in parts.glob("*.parts/*.o")}
        return made == {*others} and f"{last}.cpp" in compiled.read_text()

    try:
        while not is_at_the_last():
            assert slow.poll() is None
            time.sleep(0.1)
    finally:
        slow.kill()
        slow.communicate()
        is_slow.unlink()
    library = Path(output(start(BUILD, **environment))[0])
    commands = compiled.read_text().splitlines()
    of_killed, of_next = (command for command in commands if f"{last}.cpp" in command)
    assert of_killed != of_next, "both write to one file"
    assert len(commands) == len(others) + 2
    assert list(parts.iterdir()) == [library]
