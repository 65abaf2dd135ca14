"""Runs the test suite and judges it: `python tests/suite.py [--without-servers | --clients] [pytest's arguments]`.

The tests that start no tritonserver run first, on three workers; then the others on two, with servers of their own that
compute in one thread each; at last, one by one, those that run whole deployments. --without-servers leaves out those
that start a server of any kind, a gateway or Redis too. A test that failed runs once more, alone in a fresh process. If
it passes there, it is flaky: the run is green and says so. More than three flaky tests are red. A run that crashes, is
killed or finds no tests is red.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_FLAKY = 3
NOTHING_FOUND = 5  # pytest's exit status


@dataclass(frozen=True)
class Stage:
    name: str
    mark: str
    options: tuple[str, ...]


# More than one worker though a server takes both cores: most tests wait for processes. One that has nothing left takes
# half of what another has.
_SHARED = ("--dist", "worksteal", "--max-worker-restart", "0")
WITHOUT_TRITON = Stage("without Triton", "not server and not cluster and not slow", ("-n", "3", *_SHARED))
_SERVERS = "server or cluster or gateway or redis or rsyslog or browser or hosts or image"
WITHOUT_SERVERS = Stage("without servers", f"not ({_SERVERS} or heavy)", WITHOUT_TRITON.options)
WITH_TRITON = Stage("with Triton", "server and not slow and not cluster", ("-n", "2", *_SHARED))
CLUSTER = Stage("on the small kubelet", "cluster", ("-n", "0"))  # several Tritons and gateways need all cores
CLIENTS = Stage("of clients", "clients", ("-n", "0"))  # one server for all, and all cores for it and its client


class NotRunError(Exception):
    """The run says nothing about the tests; the message says why."""


@dataclass
class Run:
    """What one pytest process reported."""

    status: int
    is_whole: bool = False
    passed: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """Of each failed test, what its first failure says in short."""


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-servers", action="store_true", help="only the tests that start no server at all")
    parser.add_argument("--clients", action="store_true", help="only other people's clients, including slow ones")
    parser.add_argument("-m", dest="mark", default="", help="only tests with such marks, as for pytest")
    known, arguments = parser.parse_known_args(words)
    stages = [WITHOUT_TRITON, WITH_TRITON, CLUSTER]
    if known.without_servers or known.clients:
        stages = [CLIENTS if known.clients else WITHOUT_SERVERS]
    # A shell starts what it runs in the background with SIGINT ignored, and so would be all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    try:
        failures = run_stages(stages, known.mark, arguments)
        # With more, the run is red whatever a second run says.
        flaky = [test for test in failures if passes_alone(test)] if len(failures) <= MOST_FLAKY else []
    except NotRunError as error:
        print(f"\nRED: {error}")
        return 1
    print()
    for test, line in failures.items():
        print(f"{'FLAKY' if test in flaky else 'FAILED'} {test}: {line}")
    if len(failures) > MOST_FLAKY:
        print(f"RED: {len(failures)} tests failed; if more than {MOST_FLAKY} fail, none is run again")
        return 1
    if len(flaky) < len(failures):
        print(f"RED: {len(failures) - len(flaky)} failed twice")
        return 1
    print(f"GREEN after {time.monotonic() - began:.0f} s" + (f", {len(flaky)} flaky" if flaky else ""))
    return 0


def run_stages(stages: list[Stage], mark: str, arguments: list[str]) -> dict[str, str]:
    """The failures of all stages.

    Raises:
        NotRunError: if one did not come to its end, or found no tests.
    """
    failures: dict[str, str] = {}
    found = False
    for stage in stages:
        print(f"\nTests {stage.name}", flush=True)
        marks = f"({stage.mark}) and ({mark})" if mark else stage.mark
        run = run_pytest(["-m", marks, *stage.options, *arguments])
        if run.status == NOTHING_FOUND and (mark or arguments):
            continue  # what was asked for may all be in the other stage
        check(run, f"the tests {stage.name}")
        failures |= run.failures
        found = True
    if not found:
        raise NotRunError("no tests were found")
    return dict(sorted(failures.items()))


def passes_alone(test: str) -> bool:
    """In a fresh process.

    Raises:
        NotRunError: if that crashes or is killed.
    """
    print(f"\nAgain, alone: {test}", flush=True)
    run = run_pytest(["-n", "0", test])
    check(run, test)
    return run.status == 0 and run.passed > 0


def check(run: Run, what: str) -> None:
    if run.is_whole and run.status == (1 if run.failures else 0):
        return
    how = f"pytest ended with status {run.status}"
    if run.status < 0:
        how = f"pytest was killed by {signal.Signals(-run.status).name}"
    raise NotRunError(f"{what} did not run to the end: {how}")


def run_pytest(arguments: list[str]) -> Run:
    """
    Raises:
        NotRunError: if a worker crashed.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "reports"
        command = [sys.executable, "-m", "pytest", f"--report-log={log}", *arguments]
        # Where this is set, the hundreds of processes that tests start would each compile what they import.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        run = Run(subprocess.run(command, env=environment, check=False).returncode)
        lines = log.read_text().splitlines() if log.exists() else []
    for line in lines:
        report = json.loads(line)
        if report["$report_type"] == "SessionFinish":
            run.is_whole = True
        elif report["$report_type"] == "TestReport":
            if report["when"] == "???":  # xdist made it up for a worker that crashed
                raise NotRunError(report["longrepr"])
            if report["outcome"] == "failed":
                run.failures.setdefault(report["nodeid"], in_short(report["longrepr"]))
            run.passed += report["outcome"] == "passed" and report["when"] == "call"
    return run


def in_short(failure: Any) -> str:
    """The exception, or the last line of what is not one."""
    if isinstance(failure, dict) and failure.get("reprcrash"):
        return failure["reprcrash"]["message"].partition("\n")[0]
    return str(failure).strip().rpartition("\n")[2]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
