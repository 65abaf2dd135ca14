"""Inside locust: takes the samples of all users to the file, from workers by way of their reports to the master.

It also feeds locust's own statistics: one request for each sample, and TTFT and TPOT as entries of their own, which
count in no total.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import gevent
import msgspec
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from loadtests import samples
from loadtests.options import Options
from loadtests.samples import Sample

FLUSH_EVERY = 0.5  # seconds
REPORTED = "tidewright_samples"
HOPELESS_COUNT = 20  # failed requests in a row, at least, before a test is given up
MAX_KEPT = 100_000
"""Samples that wait for the next report to the master, at most; it comes every three seconds."""


class Recorder:
    def __init__(self, environment: Environment, options: Options) -> None:
        self.options = options
        self.processes = 1
        self._environment = environment
        self._waiting: list[Sample] = []
        self._failing_since: float | None = None
        self._failed = self._begun = self._taken = 0
        self.hopeless = ""
        """The error, if the test ended because nothing works."""
        runner = environment.runner
        if isinstance(runner, WorkerRunner):
            environment.events.report_to_master.add_listener(self._report)
            return
        if isinstance(runner, MasterRunner):
            environment.events.worker_report.add_listener(self._take_report)
        if options.samples:
            self._file = Path(options.samples).open("ab")  # noqa: SIM115 - as long as locust
            gevent.spawn(self._flush_always)
            environment.events.quitting.add_listener(lambda **_: self._flush())

    def begin(self) -> bool:
        """Whether a user may send another request."""
        self._begun += 1
        return not self.options.requests or self._begun <= self.options.requests

    def take(self, sample: Sample) -> None:
        """Of a user of this process."""
        self._taken += 1
        if self._taken == self.options.requests and self._environment.runner:
            gevent.spawn(self._environment.runner.quit)
        self._to_locust(sample)
        if len(self._waiting) < MAX_KEPT:
            self._waiting.append(sample)
        if not isinstance(self._environment.runner, WorkerRunner):
            self._judge(sample)

    def _to_locust(self, sample: Sample) -> None:
        name, stats = f"{sample.protocol} {sample.kind}", self._environment.stats
        self._environment.events.request.fire(
            request_type="GENERATE",
            name=name,
            response_time=1000 * sample.last,
            response_length=sample.output_tokens,
            exception=RuntimeError(sample.error) if sample.error else None,
            context={"tenant": sample.tenant},
        )
        if sample.served:
            stats.get(name, "TTFT").log(int(1000 * sample.first), 0)
            if sample.per_token:
                stats.get(name, "TPOT").log(int(1000 * sample.per_token), 0)

    def _report(self, client_id: str, data: dict[str, Any]) -> None:
        data[REPORTED] = msgspec.to_builtins(self._waiting)
        self._waiting = []

    def _take_report(self, client_id: str, data: dict[str, Any]) -> None:
        for sample in msgspec.convert(data.pop(REPORTED, []), list[Sample]):
            self._waiting.append(sample)
            self._judge(sample)

    def _flush_always(self) -> None:
        while True:
            gevent.sleep(FLUSH_EVERY)
            self._flush()

    def _flush(self) -> None:
        if self.options.samples:
            waiting, self._waiting = self._waiting, []
            samples.write(self._file, waiting)

    def _judge(self, sample: Sample) -> None:
        """Ends a test in which nothing works: one line says more than ten thousand failures."""
        if not sample.error:
            self._failing_since, self._failed = None, 0
            return
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        self._failed += 1
        if now - self._failing_since < self.options.give_up or self._failed < HOPELESS_COUNT or self.hopeless:
            return
        self.hopeless = sample.error
        what = f"for {self.options.give_up:g} s every request failed ({self._failed})"
        print(f"Stopped: {what}. The last one: {sample.error}", file=sys.stderr)
        self._environment.process_exit_code = 1
        if self._environment.runner:
            gevent.spawn(self._environment.runner.quit)
