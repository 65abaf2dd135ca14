"""tests/suite.py over tiny suites: which runs are green, and what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("suite.py")
PASSES = "def test_passes(): pass\n"
FAILS = "def test_fails(): assert 1 == 2\n"
SERVER = """
import pytest

@pytest.mark.server
def test_with_server():
    pass

@pytest.mark.cluster
def test_with_pods():
    pass
"""
# What fails the first time leaves a mark, and does something else the second time.
FLAKY = """
import os, pathlib, pytest, signal

@pytest.mark.parametrize("number", range({number}))
def test_flaky(number):
    mark = pathlib.Path(__file__).with_name(f"mark {{number}}")
    if not mark.exists():
        mark.touch()
        {first}
    {then}
"""
FAIL = 'raise ValueError(f"no luck with {number}\\nand more")'
CRASH = "os.kill(os.getpid(), signal.SIGSEGV)"
ONE_STAGE = ("--without-servers", "-n", "0")  # no workers: they take time to start


def flaky(number: int, first: str = FAIL, then: str = "pass") -> str:
    return FLAKY.format(number=number, first=first, then=then)


def judge(folder: Path, code: str, *arguments: str) -> tuple[int, list[str]]:
    """The exit status, and the last lines of what it said."""
    (folder / "test_it.py").write_text(code)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    server\n    cluster\n")
    # Of this environment's plugins only what the script uses; the others take a second to load.
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p xdist -p pytest_reportlog.plugin"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | plugins
    command = [sys.executable, SUITE, *arguments]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return run.returncode, [line for line in run.stdout.splitlines() if line][-5:]


def test_all_pass(tmp_path: Path) -> None:
    status, said = judge(tmp_path, PASSES + SERVER)
    assert status == 0
    assert said[-1].startswith("GREEN after ")
    assert said[-1].endswith(" s")
    assert not [line for line in said if line.startswith("FLAKY")]


def test_one_that_fails_twice_is_red(tmp_path: Path) -> None:
    status, said = judge(tmp_path, PASSES + FAILS + flaky(1), *ONE_STAGE)
    assert status == 1
    assert said[-3:] == [
        "FAILED test_it.py::test_fails: assert 1 == 2",
        "FLAKY test_it.py::test_flaky[0]: ValueError: no luck with 0",
        "RED: 1 failed twice",
    ]


def test_three_flaky_ones_are_green_and_named(tmp_path: Path) -> None:
    status, said = judge(tmp_path, PASSES + flaky(3) + SERVER)
    assert status == 0
    assert said[-4:-1] == [f"FLAKY test_it.py::test_flaky[{i}]: ValueError: no luck with {i}" for i in range(3)]
    assert said[-1].startswith("GREEN after ")
    assert said[-1].endswith(" s, 3 flaky")


def test_four_flaky_ones_are_red(tmp_path: Path) -> None:
    status, said = judge(tmp_path, PASSES + flaky(4), *ONE_STAGE)
    assert status == 1
    assert said[-2] == "FAILED test_it.py::test_flaky[3]: ValueError: no luck with 3"
    assert said[-1] == "RED: 4 tests failed; if more than 3 fail, none is run again"


def test_each_is_run_again_in_a_process_of_its_own(tmp_path: Path) -> None:
    code = flaky(2, then="mark.with_name(f'process {os.getpid()}').touch()")
    assert judge(tmp_path, code, *ONE_STAGE)[0] == 0
    assert len(list(tmp_path.glob("process *"))) == 2


def test_a_fixture_may_be_what_is_flaky(tmp_path: Path) -> None:
    fixture = (
        flaky(1).replace('mark.parametrize("number", range(1))', "fixture").replace("test_flaky(number)", "number()")
    )
    status, said = judge(tmp_path, fixture.replace("{number}", "0") + "def test_it(number): pass\n", *ONE_STAGE)
    assert (status, said[-2]) == (0, "FLAKY test_it.py::test_it: ValueError: no luck with 0")


def test_one_that_is_skipped_when_run_again_has_not_passed(tmp_path: Path) -> None:
    status, said = judge(tmp_path, PASSES + flaky(1, then="pytest.skip()"), *ONE_STAGE)
    assert (status, said[-1]) == (1, "RED: 1 failed twice")


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        # In a worker.
        (PASSES + flaky(1, CRASH), ["--without-servers"], "crashed while running 'test_it.py::test_flaky[0]'"),
        (flaky(1, CRASH), ONE_STAGE, "pytest was killed by SIGSEGV"),
        # Before the end, with a status that looks like an end's.
        (FAILS + flaky(1, "os._exit(1)"), ONE_STAGE, "pytest ended with status 1"),
        (PASSES + flaky(1, "os._exit(0)"), ONE_STAGE, "pytest ended with status 0"),
        ("nonsense", ONE_STAGE, "pytest ended with status 2"),
        (PASSES, ["-n", "0", "-k", "nowhere"], "no tests were found"),
        # Without arguments, all stages have tests.
        (PASSES, [], "the tests with Triton did not run to the end: pytest ended with status 5"),
        # The second time.
        (flaky(1, then=CRASH), ONE_STAGE, "test_it.py::test_flaky[0] did not run to the end: pytest was killed by"),
    ],
)
def test_a_run_that_does_not_come_to_its_end_is_red(
    tmp_path: Path, code: str, arguments: list[str], words: str
) -> None:
    status, said = judge(tmp_path, code, *arguments)
    assert status == 1
    assert said[-1].startswith("RED: ")
    assert words in said[-1]


@pytest.mark.parametrize("arguments", [["-k", "with_server"], ["-m", "server"], ["test_it.py::test_with_server"]])
def test_what_is_asked_for_may_be_in_one_stage_alone(tmp_path: Path, arguments: list[str]) -> None:
    status, said = judge(tmp_path, PASSES + SERVER, *arguments, "-n", "0")
    assert status == 0
    assert said[-1].startswith("GREEN")
