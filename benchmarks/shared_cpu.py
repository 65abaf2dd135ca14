"""The engine on cores that it shares. `python -m benchmarks.shared_cpu`; wants an otherwise idle machine.

Tokens a second of engines without Triton, which decode `--batch` sequences each: alone; two of them on the same cores;
beside a process that keeps one core busy; under a CPU quota of one and a half cores. `before` has as many threads as
there are cores, whose OpenMP library spins as long as it does by default; `now` is what the engine does by itself. The
situations take turns in each round. Printed are medians, and their share of the same engine alone; of two engines, the
slower one counts. The workloads of `tidewright bench` show what it costs an engine that has the cores to itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import msgspec

from tidewright.bench.workloads import WORKLOADS, Request, token_ids
from tidewright.bridge.engine_client import EngineClient, EngineEvents
from tidewright.cache import EMBEDDED_MODEL
from tidewright.config import Settings
from tidewright.engine.messages import Abort, EngineStats, Ready, SequenceOutput, Submit
from tidewright.launch.prepare import prepare
from tidewright.schema import SamplingParams

LIBRARY_SPINS = "300000"  # what GCC's OpenMP library does by itself
QUOTA, PERIOD = 1.5, 100_000  # cores; microseconds
SETTLE = 2.0  # seconds from a change of the surroundings to its measurement
ALONE = "alone"
WHOLE = ("W1", "W2", "W3", "W4")


@dataclass(frozen=True)
class Kind:
    name: str
    threads: int  # 0: as many as the engine takes by itself
    spins: str  # empty: likewise


class Engine:
    """An engine process, and how many tokens it has made."""

    def __init__(self, folder: Path, kind: Kind, cores: float = 0) -> None:
        """With a quota of `cores`, if that is not 0; raises OSError where there can't be one."""
        self.tokens = 0
        self.ids = token_ids(folder)
        self._last = 0
        settings = Settings(threads=kind.threads, kv_cache_memory="256MiB", prefix_caching=False)
        config = msgspec.structs.replace(settings.engine_config(folder), standby=False)
        events = EngineEvents(outputs=self._count, stats=_ignore, up=_ignore, lost=_lost, out_of_memory=_lost)
        self._client = EngineClient(config, events, start_timeout=300, heartbeat_timeout=300)
        with quota(cores) if cores else contextlib.nullcontext(), environment("GOMP_SPINCOUNT", kind.spins):
            self._client.start()

    def _count(self, outputs: list[SequenceOutput]) -> None:
        self.tokens += sum(len(output.token_ids) for output in outputs)

    def send(self, requests: Sequence[Request]) -> range:
        numbers = range(self._last, self._last + len(requests))
        self._last += len(requests)
        for number, request in zip(numbers, requests, strict=True):
            sampling = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True, seed=0)
            self._client.send(Submit(number, request.prompt, sampling))
        return numbers

    @contextlib.contextmanager
    def decoding(self, batch: int) -> Iterator[None]:
        """Sequences that do not end meanwhile."""
        numbers = self.send([Request(random.Random(i).choices(self.ids, k=16), 4000) for i in range(batch)])
        try:
            yield
        finally:
            for number in numbers:
                self._client.send(Abort(number))

    def seconds(self, requests: Sequence[Request]) -> float:
        """Until they all have ended."""
        end = self.tokens + sum(request.max_tokens for request in requests)
        began = time.perf_counter()
        self.send(requests)
        while self.tokens < end:
            time.sleep(0.001)
        return time.perf_counter() - began

    def close(self) -> None:
        self._client.stop()


def _ignore(_: EngineStats | Ready) -> None:
    pass


def _lost(cause: str) -> None:
    print(f"an engine died: {cause}", file=sys.stderr)
    os._exit(1)


def rate(engines: Sequence[Engine], batch: int, seconds: float) -> float:
    """Tokens a second of the slowest of engines that decode at the same time."""
    with contextlib.ExitStack() as stack:
        for engine in engines:
            stack.enter_context(engine.decoding(batch))
        time.sleep(SETTLE)
        began, before = time.perf_counter(), [engine.tokens for engine in engines]
        time.sleep(seconds)
        passed = time.perf_counter() - began
        made = [engine.tokens - tokens for engine, tokens in zip(engines, before, strict=True)]
    time.sleep(0.2)  # the step that they were aborted in
    return min(made) / passed


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """For processes that are started meanwhile; empty: not set."""
    before = os.environ.pop(name, None)
    if value:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Another process computes on one of the cores, all the time."""
    core = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def quota(cores: float) -> Iterator[None]:
    """What is started meanwhile stays in a cgroup with that limit. Raises OSError where none can be made."""
    top = Path("/sys/fs/cgroup")
    v1 = (top / "cpu" / "cpu.cfs_quota_us").exists()
    parent = top / "cpu" if v1 else top
    folder = parent / f"tidewright-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        limit = str(int(cores * PERIOD))
        if v1:
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD))
            (folder / "cpu.cfs_quota_us").write_text(limit)
        else:
            (folder / "cpu.max").write_text(f"{limit} {PERIOD}")
        (folder / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        folder.rmdir()
        raise
    try:
        yield
    finally:
        (parent / "cgroup.procs").write_text(str(os.getpid()))


def remove_quotas() -> None:
    """Once the engines in them have ended."""
    for folder in Path("/sys/fs/cgroup").glob(f"**/tidewright-{os.getpid()}-*"):
        folder.rmdir()


class Contender:
    """Two engines of a kind, and one more under a quota, with what was measured of them."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind = kind
        self.found: dict[str, list[float]] = {}
        self.engines = [Engine(folder, kind), Engine(folder, kind)]
        try:
            self.limited = [Engine(folder, kind, QUOTA)]
        except OSError as error:
            print(f"No quota: {error}. As root with a writable cgroup of the cpu controller it is measured, too.")
            self.limited = []

    def situations(self, batch: int, seconds: float) -> dict[str, Callable[[], float]]:
        one, two = self.engines[:1], self.engines

        def crowded() -> float:
            with busy_core():
                return rate(one, batch, seconds)

        return {
            ALONE: lambda: rate(one, batch, seconds),
            "two engines, each": lambda: rate(two, batch, seconds),
            "a busy core beside": crowded,
            **({f"a quota of {QUOTA} cores": lambda: rate(self.limited, batch, seconds)} if self.limited else {}),
        }

    def note(self, what: str, figure: float) -> None:
        self.found.setdefault(what, []).append(figure)

    def median(self, what: str) -> float:
        return statistics.median(self.found[what])

    def close(self) -> None:
        for engine in (*self.engines, *self.limited):
            engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--batch", type=int, default=1, help="sequences of each engine")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spins", default="", help="GOMP_SPINCOUNT of `now`, instead of the engine's own")
    parser.add_argument("--only", choices=["shared", "alone"], help="situations, or whole workloads alone")
    options = parser.parse_args()
    folder = prepare(options.model)
    cores = len(os.sched_getaffinity(0))
    kinds = [Kind("before", cores, LIBRARY_SPINS), Kind("now", 0, options.spins)]
    contenders: list[Contender] = []
    try:
        contenders += [Contender(kind, folder) for kind in kinds]
        for number in range(options.rounds):
            print(f"Round {number + 1} of {options.rounds}, load average {os.getloadavg()[0]:.1f}", flush=True)
            if options.only != "alone":
                for what in contenders[0].situations(options.batch, options.seconds):
                    for one in contenders:
                        one.note(what, one.situations(options.batch, options.seconds)[what]())
            if options.only != "shared":
                for name in WHOLE:
                    for one in contenders:
                        requests = WORKLOADS[name].requests(random.Random(f"{name} {number}"), one.engines[0].ids)
                        one.note(name, one.engines[0].seconds(requests))
    finally:
        for one in contenders:
            one.close()
        remove_quotas()
    report(contenders, cores, options.batch)


def report(contenders: Sequence[Contender], cores: int, batch: int) -> None:
    before, now = contenders
    print(f"\n{cores} cores; tokens/s of {batch} sequences, and the share of the same engine alone")
    for what in before.found:
        if what in WHOLE:
            continue
        shares = [
            f"{one.median(what):8.1f} ({one.median(what) / (one.median(ALONE) or inf):.2f})" for one in contenders
        ]
        print(f"{what:24} before {shares[0]}   now {shares[1]}")
    for what in [ALONE, *WHOLE]:
        if what in now.found:
            faster = before.median(what) / (now.median(what) or inf)
            print(f"{what:8} now is {1 / faster if what == ALONE else faster:.3f}x as fast as before")


if __name__ == "__main__":
    main()
