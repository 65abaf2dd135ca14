"""One container of a pod: started, probed, restarted with back-off, ended."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from deployment.kubelet.environment import MissingError
from deployment.kubelet.manifests import Manifest
from deployment.kubelet.probes import LIVENESS, READINESS, STARTUP, Place, Probe, attempt
from deployment.kubelet.sandbox import Running, Sandbox
from helpers.hosts import Host

_TICK = 0.02  # seconds between two looks at a process
_FIRST_BACKOFF, _LONGEST_BACKOFF, _CALM = 10.0, 300.0, 600.0  # seconds, as the kubelet has them
_LEAST_GRACE = 2.0  # seconds from SIGTERM to SIGKILL, if preStop took all of the grace period


class Container:
    """`sandbox` makes what it runs in, and may raise MissingError; `tell` gets reason and message of an event."""

    def __init__(
        self,
        spec: Manifest,
        folder: Path,
        hosts: tuple[Host, Host],
        sandbox: Callable[[], Sandbox],
        tell: Callable[[str, str], None],
        pace: float,
    ) -> None:
        """`hosts`: the node and the pod. `pace`: seconds of back-off for each second of Kubernetes'."""
        self.name: str = spec["name"]
        self.spec = spec
        self.log_file = folder / f"{self.name}.log"
        self._folder, self._hosts, self._sandbox, self._tell, self._pace = folder, hosts, sandbox, tell, pace
        self.running: Running | None = None
        self.started = self.ready = False
        self.restarts = 0
        self.exit_code: int | None = None
        """Of its last run."""
        self.probes: list[Probe] = []
        self.began_at = self.ready_at = 0.0
        self._unwell = threading.Event()
        self._starting = threading.Lock()

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def run(self, stop: threading.Event, until_success: bool = False) -> None:
        """Keeps it running until `stop`; with `until_success`, as an init container, until it has ended well."""
        backoff = 0.0
        while not stop.is_set():
            began = time.monotonic()
            self._run_once(stop, until_success)
            if stop.is_set() or (until_success and self.exit_code == 0):
                return
            self.restarts += 1
            if time.monotonic() - began > _CALM:
                backoff = 0.0
            if backoff:
                self._tell("BackOff", f"Back-off restarting failed container {self.name}")
                stop.wait(backoff * self._pace)
            backoff = min(max(_FIRST_BACKOFF, 2 * backoff), _LONGEST_BACKOFF)

    def terminate(self, deadline: float) -> None:
        """preStop, SIGTERM, and SIGKILL at `deadline`."""
        with self._starting:  # either it runs by now, or it sees that it must not start
            running = self.running
        hook = self.spec.get("lifecycle", {}).get("preStop")
        if running is None:
            return
        if hook and (trouble := attempt(hook, self._place(running), max(0.1, deadline - time.monotonic()))):
            self._tell("FailedPreStopHook", trouble)
        self._end(running, max(deadline, time.monotonic() + _LEAST_GRACE))

    def _run_once(self, stop: threading.Event, is_init: bool) -> None:
        self.started = self.ready = False
        self._unwell.clear()
        while True:
            try:
                sandbox = self._sandbox()
                break
            except MissingError as error:
                self._tell("CreateContainerConfigError", str(error))
                if stop.wait(0.2):
                    return
        with self._starting, self.log_file.open("ab") as output:
            if stop.is_set():
                return
            self.began_at = time.monotonic()
            running = self.running = sandbox.start(self._folder / f"{self.name}.root", output)
        over = threading.Event()
        probes = [] if is_init else self._start_probes(running, over)
        while running.exit_code is None:
            if (is_init and stop.is_set()) or (self._unwell.is_set() and not stop.is_set()):
                self._end(running, time.monotonic() + self.spec.get("grace", 30))
            time.sleep(_TICK)
        over.set()
        self.exit_code, self.started, self.ready, self.running = running.exit_code, False, False, None
        for probe in probes:
            probe.join()

    def _end(self, running: Running, deadline: float) -> None:
        running.send(signal.SIGTERM)
        if not running.wait(deadline - time.monotonic()):
            self._tell("Killing", f"{self.name} did not end within its grace period")
            running.send(signal.SIGKILL)
            running.wait(30)

    def _place(self, running: Running) -> Place:
        ports = {port["name"]: port["containerPort"] for port in self.spec.get("ports", ()) if "name" in port}
        return Place(*self._hosts, ports, running)

    def _start_probes(self, running: Running, over: threading.Event) -> list[threading.Thread]:
        self.probes = [
            Probe(kind, self.spec[kind], self._place(running), self._reporter(kind))
            for kind in (STARTUP, READINESS, LIVENESS)
            if kind in self.spec
        ]

        def run() -> None:
            for probe in self.probes:
                if probe.kind == STARTUP:
                    probe.run(over)
            if over.is_set():
                return
            self.started = True
            if READINESS not in self.spec:
                self._is_ready(True)
            others = [probe for probe in self.probes if probe.kind != STARTUP]
            threads = [threading.Thread(target=one.run, args=(over,), daemon=True) for one in others]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        thread = threading.Thread(target=run, name=f"probes-{self.name}", daemon=True)
        thread.start()
        return [thread]

    def _reporter(self, kind: str) -> Callable[[bool, str], None]:
        def report(verdict: bool, trouble: str) -> None:
            if trouble:
                self._tell("Unhealthy", f"{kind} of {self.name} failed: {trouble}")
            if kind == READINESS:
                self._is_ready(verdict)
            elif not verdict:
                self._unwell.set()

        return report

    def _is_ready(self, ready: bool) -> None:
        if ready and not self.ready:
            self.ready_at = time.monotonic()
        self.ready = ready
