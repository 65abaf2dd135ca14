"""Startup, readiness and liveness probes of a container."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

from deployment.kubelet.manifests import Manifest
from deployment.kubelet.sandbox import Running
from helpers.hosts import Host

STARTUP, READINESS, LIVENESS = "startupProbe", "readinessProbe", "livenessProbe"


@dataclass
class Place:
    """Where the probed container is."""

    node: Host
    host: Host
    ports: dict[str, int]
    running: Running

    def number(self, port: str | int) -> int:
        return self.ports[port] if isinstance(port, str) else port


@dataclass
class Probe:
    """`report` gets each change of the verdict, with the reason of a failure. A startup probe has only one."""

    kind: str
    spec: Manifest
    place: Place
    report: Callable[[bool, str], None]
    verdict: bool | None = None
    durations: list[float] = field(default_factory=list)
    """Of each try, in seconds."""

    def run(self, stop: threading.Event) -> None:
        """Until `stop`, or a startup probe's success."""
        if stop.wait(self.spec.get("initialDelaySeconds", 0)):
            return
        successes = failures = 0
        while True:
            began = time.monotonic()
            trouble = self.once()
            self.durations.append(time.monotonic() - began)
            if stop.is_set():
                return
            successes, failures = (0, failures + 1) if trouble else (successes + 1, 0)
            if successes >= self.spec.get("successThreshold", 1) and self.verdict is not True:
                self._decide(True, "")
                if self.kind == STARTUP:
                    return
            if failures >= self.spec.get("failureThreshold", 3) and self.verdict is not False:
                self._decide(False, trouble)
            if stop.wait(max(0.0, began + self.spec.get("periodSeconds", 10) - time.monotonic())):
                return

    def _decide(self, verdict: bool, trouble: str) -> None:
        self.verdict = verdict
        self.report(verdict, trouble)

    def once(self) -> str:
        """Empty for a success, else why not."""
        return attempt(self.spec, self.place, self.spec.get("timeoutSeconds", 1))


def attempt(action: Manifest, place: Place, timeout: float | None) -> str:
    """Of a probe or a hook. Empty for a success, else why not."""
    if "exec" in action:
        try:
            run = place.running.execute(action["exec"]["command"], timeout)
        except subprocess.TimeoutExpired:
            return f"command timed out after {timeout} s"
        return "" if run.returncode == 0 else f"exit code {run.returncode}: {run.stdout.strip()}"
    if "httpGet" in action:
        return _get(action["httpGet"], place, timeout)
    if "tcpSocket" in action:
        with place.node.inside(), socket.socket() as probe:
            probe.settimeout(timeout)
            try:
                probe.connect((place.host.address, place.number(action["tcpSocket"]["port"])))
            except OSError as error:
                return str(error)
        return ""
    assert "sleep" in action, f"no such action: {action}"
    time.sleep(action["sleep"]["seconds"])
    return ""


def _get(action: Manifest, place: Place, timeout: float | None) -> str:
    assert action.get("scheme", "HTTP") == "HTTP"
    port = place.number(action["port"])
    headers = {one["name"]: one["value"] for one in action.get("httpHeaders", ())}
    url = f"http://{action.get('host', place.host.address)}:{port}{action.get('path', '/')}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with place.node.inside(), opener.open(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
            return "" if 200 <= answer.status < 400 else f"status {answer.status}"
    except urllib.error.HTTPError as error:
        return f"status {error.code}: {error.read(200).decode(errors='replace')}"
    except OSError as error:
        return str(error)
