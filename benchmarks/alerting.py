"""How long from a fault to the webhook? `python -m benchmarks.alerting`; some minutes.

Two real Tritons, a real gateway with API keys, a real Redis, and a real Prometheus and Alertmanager with the files of
monitoring/. One fault after the other is injected, and mended when its alert has come. Printed: the seconds until the
webhook heard of it, and until it heard that it is over; the target is 10 s. Before the first fault, nothing may fire.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil

from benchmarks.alerting_watchers import Watchers
from benchmarks.root_cause_faults import FAULTS, Stack
from tidewright.cache import EMBEDDED_MODEL
from tidewright.launch.prepare import prepare

TARGET = 10.0  # seconds
PATIENCE = 60.0  # for an alert
RESOLVES = 240.0  # for its end: restarts stay in their windows for minutes
IDLE = 10.0  # seconds in which nothing may fire
LASTING = {"EngineRestarted", "EngineRestartsOften"}  # they end minutes after the fault
REFUSED = re.compile(r'^tidewright_gateway_refusals_total{limit="max_queue"} [1-9]', re.MULTILINE)
BY_NAME = {fault.name: fault.inject for fault in FAULTS}


@dataclass(frozen=True)
class Case:
    fault: str
    inject: Callable[[Stack], AbstractContextManager[None]]
    """Mends it when it is left."""
    alerts: tuple[str, ...]
    """One of these must come."""
    severity: str = "critical"
    is_there_when_injected: bool = False
    """It takes a while to inject, and only then is a fault."""


@contextmanager
def _queue_full(stack: Stack) -> Iterator[None]:
    """It is full when the first one is refused: 60 clients take seconds to start where the model computes."""
    with BY_NAME["overload"](stack):
        with httpx.Client(headers={"Authorization": f"Bearer {stack.keys['ops']}"}, trust_env=False) as client:
            while not REFUSED.search(client.get(f"http://{stack.addresses[0]}/metrics", timeout=60).text):
                time.sleep(0.1)
        yield


@contextmanager
def _engines_killed(stack: Stack) -> Iterator[None]:
    """Each that takes over is killed as well."""
    for _ in range(3):
        stack.child(stack.tritons[0], "tidewright.engine").kill()
        time.sleep(1.5)
    yield


@contextmanager
def _replicas_killed(stack: Stack) -> Iterator[None]:
    for triton in stack.tritons:
        psutil.Process(triton.pid).kill()
    yield
    for triton in stack.tritons:
        triton.stop()
        triton.start_again()


@contextmanager
def _gateway_frozen(stack: Stack) -> Iterator[None]:
    os.kill(stack.gateway.pid, signal.SIGSTOP)
    yield
    os.kill(stack.gateway.pid, signal.SIGCONT)


CASES = (
    Case("engine killed", BY_NAME["engine killed"], ("EngineRestarted",), "warning"),
    Case("engines killed", _engines_killed, ("EngineRestartsOften", "EngineDown")),
    Case("stub killed", BY_NAME["stub killed"], ("ModelProcessDead",)),
    Case("Redis killed", BY_NAME["Redis killed"], ("StoreLost",)),
    Case("queue full", _queue_full, ("QueueFull",), is_there_when_injected=True),
    Case("all replicas killed", _replicas_killed, ("NoReplicaUsable",)),
    Case("gateway frozen", _gateway_frozen, ("NoGateway",)),
)


def measure(case: Case, stack: Stack, watchers: Watchers) -> bool:
    since = time.time()
    with case.inject(stack):
        began = time.time() if case.is_there_when_injected else since
        heard = watchers.webhook.wait(
            lambda one: one.name in case.alerts and one.status == "firing" and one.receiver == case.severity,
            since,
            PATIENCE,
        )
        mended = time.time()  # its cure begins
    if heard is None:
        print(f"{case.fault:20} {' or '.join(case.alerts)}: NOT HEARD; firing: {sorted(watchers.firing())}")
        return False
    took, over = heard.at - began, ""
    if heard.name not in LASTING:
        end = watchers.webhook.wait(lambda one: (one.name, one.status) == (heard.name, "resolved"), mended, RESOLVES)
        over = f"; over {end.at - mended:.1f} s after the cure began" if end else "; NOT RESOLVED"
    ok = took <= TARGET and "NOT" not in over
    print(f"{case.fault:20} {heard.name} ({case.severity}): {took:.1f} s{'' if took <= TARGET else ' TOO LATE'}{over}")
    return ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", action="append", choices=[case.fault for case in CASES], help="only this one")
    options = parser.parse_args()
    chosen = [case for case in CASES if not options.fault or case.fault in options.fault]
    with TemporaryDirectory() as name, Stack(prepare(EMBEDDED_MODEL), Path(name)) as stack:
        gateway, *tritons = stack.addresses
        with Watchers(gateway, tritons, stack.keys["ops"], Path(name)) as watchers:
            watchers.wait_up()
            time.sleep(IDLE)
            idle = sorted(watchers.firing())
            print(f"idle                 {'nothing fires' if not idle else f'FIRES: {idle}'}", flush=True)
            good = not idle
            for case in chosen:
                good &= measure(case, stack, watchers)
                sys.stdout.flush()
    sys.exit(not good)


if __name__ == "__main__":
    main()
