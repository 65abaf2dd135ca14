"""Runs locust in a process of its own, says how far it is, and ends it so that no sample is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np

from loadtests import samples
from loadtests.options import STOP, Options
from loadtests.samples import Sample
from loadtests.shapes import users_at

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
PROGRESS_EVERY = 5.0  # seconds
WINDOW = 10.0  # seconds of which a line of progress tells
DRAIN = 60  # seconds that running requests get at the end
GRACE = 15.0  # beyond that, before locust is killed


class LoadError(Exception):
    """Locust did not run; the message says why."""


@dataclass(frozen=True)
class Fleet:
    """Which processes make the load."""

    workers: int = 0
    """On this machine, besides the master; 0: one process does all."""
    expect: int = 0
    """Workers that come from other machines."""
    bind_port: int = 5557
    patience: int = 300
    """Seconds that workers of other machines have to come."""

    def arguments(self) -> list[str]:
        if not self.workers and not self.expect:
            return []
        return [
            f"--processes={self.workers}" if self.workers else "--master",
            f"--expect-workers={self.expect + self.workers}",
            f"--expect-workers-max-wait={self.patience}",
            f"--master-bind-port={self.bind_port}",
            f"--master-port={self.bind_port}",  # what the workers of --processes connect to
        ]


@dataclass
class Result:
    samples: list[Sample]
    began: float
    ended: float
    interrupted: bool
    status: int
    words: str
    """What locust said."""
    ran: float = 0.0
    """Seconds from locust's start to its end."""

    def stopped(self, options: Options) -> str:
        """Why the test ended early; empty if it did not, or if the user wanted so."""
        if found := [line for line in self.words.splitlines() if line.startswith("Stopped: ")]:
            return found[-1]
        is_whole = self.ran >= options.duration or 0 < options.requests <= len(self.samples)
        if self.interrupted or is_whole:
            return ""
        last = last_lines(self.words, 1)
        return (
            f"Stopped: locust ended by itself after {self.ran:.0f} of {options.duration:.0f} s, with the status "
            f"{self.status}{f': {last}' if last else ''}"
        )


def command(options: Options, fleet: Fleet) -> list[str]:
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"),
        *("--loglevel=WARNING", f"--stop-timeout={DRAIN}", f"--host={options.url}", *fleet.arguments()),
    ]


class Run:
    """One test; `step` is to be called until it is over."""

    def __init__(self, options: Options, fleet: Fleet, folder: Path) -> None:
        self.options = msgspec.structs.replace(options, samples=str(folder / "samples.jsonl"))
        Path(self.options.samples).write_bytes(b"")
        self._file = Path(self.options.samples).open("rb")  # noqa: SIM115 - as long as the run
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.began, self._started = time.time(), time.monotonic()
        self.process = subprocess.Popen(
            command(options, fleet),
            env=self.options.environment(),
            stdout=subprocess.DEVNULL,
            stderr=self._words,
            stdin=subprocess.DEVNULL,
            cwd=LOCUSTFILE.parent.parent,
            start_new_session=True,
        )
        self.samples: list[Sample] = []
        self.interrupted = False

    def poll(self) -> bool:
        """Reads what is new. False: it is over."""
        running = self.process.poll() is None
        self.samples += samples.read_from(self._file)
        return running

    def interrupt(self) -> None:
        """Lets running requests end; called again, it does not."""
        if self.interrupted:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.interrupted = True
        Path(self.options.samples).with_suffix(STOP).touch()

    def end(self) -> None:
        """At once, if it still runs: it would go on without us."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def result(self) -> Result:
        ran = time.monotonic() - self._started
        try:
            self.process.wait(DRAIN + GRACE)
        except subprocess.TimeoutExpired:
            self.end()
        self.poll()
        self._file.close()
        self._words.seek(0)
        words = self._words.read()
        self._words.close()
        began = min((one.at for one in self.samples), default=self.began)
        ended = max((one.at + one.last for one in self.samples), default=began)
        return Result(self.samples, began, ended, self.interrupted, self.process.returncode, words, ran)


def run(options: Options, fleet: Fleet, folder: Path) -> Result:
    """The whole of a test, with a line of progress every few seconds; Ctrl-C ends it early.

    Raises:
        LoadError: no request was made, or there is no locust.
    """
    if find_spec("locust") is None:
        raise LoadError("locust is not installed here: `make loadtest` installs it, or pip install -e '.[dev]'")
    one = Run(options, fleet, folder)
    try:
        result = _watched(one)
    finally:
        one.end()
    if not result.samples and not result.interrupted:
        raise LoadError(f"locust made no request (status {result.status}):\n{last_lines(result.words)}")
    return result


def _watched(one: Run) -> Result:
    due = time.monotonic() + PROGRESS_EVERY
    while True:
        try:
            if not one.poll():
                break
            time.sleep(0.2)
            if time.monotonic() >= due:
                due += PROGRESS_EVERY
                print(progress(one), file=sys.stderr)
        except KeyboardInterrupt:
            print("Stopping: running requests end first; Ctrl-C again does not wait for them.", file=sys.stderr)
            one.interrupt()
    return one.result()


def progress(one: Run) -> str:
    now, began = time.time(), min((sample.at for sample in one.samples[:1000]), default=time.time())
    recent = []
    for sample in reversed(one.samples):
        age = now - sample.at - sample.last
        if age < WINDOW:
            recent.append(sample)
        elif age > 2 * WINDOW:  # workers report theirs seconds later, so their order is not quite that of time
            break
    firsts = [1000 * sample.first for sample in recent if sample.served]
    passed, options = max(0.0, now - began), one.options
    users = users_at(options.shape, passed, options.duration, options.users)
    of = "" if options.requests else f" of {options.duration:.0f}"
    text = f"{min(passed, options.duration):5.0f}{of} s  {users} users  {len(one.samples)} requests"
    text += f" of {options.requests}" if options.requests else ""
    if firsts:
        p50, p99 = np.percentile(firsts, (50, 99))
        text += f"  {len(recent) / WINDOW:.1f}/s  TTFT p50 {p50:.0f} ms, p99 {p99:.0f} ms"
    if failed := [sample.error for sample in one.samples if sample.error]:
        text += f"  {len(failed)} failed, the last: {failed[-1][:60]}"
    return text


def last_lines(words: str, count: int = 5) -> str:
    return "\n".join(words.strip().splitlines()[-count:])


def worker(master: str, port: int, processes: int) -> int:
    """Works for a master on another machine until that ends; the status to exit with."""
    command: Sequence[str] = [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--worker", "--loglevel=WARNING"),
        *(f"--master-host={master}", f"--master-port={port}", "--headless"),
        *([f"--processes={processes}"] if processes > 1 else []),
    ]
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, cwd=LOCUSTFILE.parent.parent, check=False).returncode
    except KeyboardInterrupt:
        return 130
