"""Does the runbooks' first command name the cause? `python -m benchmarks.root_cause`; a few minutes.

Two real Tritons, a real gateway with API keys, and a real Redis for its limits. One fault after the other, in random
order, is injected; `tidewright diagnose` is run once, as somebody does who was paged; then the fault is mended.
Printed: whether one of its findings names the cause, at which place of the list, and the finding.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.root_cause_faults import FAULTS, Fault, Stack
from tidewright.cache import EMBEDDED_MODEL
from tidewright.launch.prepare import prepare

CALM = 60.0  # seconds in which the stack must be well again


def diagnose(stack: Stack) -> tuple[int, list[str]]:
    """Exit code and findings, each "SEVERITY WHERE: CAUSE"."""
    command = [Path(sys.executable).with_name("tidewright"), "diagnose", *stack.addresses, "--key-file", stack.key_file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.stderr:
        raise SystemExit(f"tidewright diagnose: {done.stderr}")
    return done.returncode, [line for line in done.stdout.splitlines() if line and line[0] != " "]


def wait_calm(stack: Stack) -> None:
    deadline = time.monotonic() + CALM
    while True:
        code, findings = diagnose(stack)
        others = [line for line in findings if "was started again" not in line]  # that stays news for a while
        if code == 0 or not [line for line in others if not line.startswith("info")]:
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"not calm after {CALM:g} s: {findings}")


def try_one(stack: Stack, fault: Fault) -> bool:
    with fault.inject(stack):
        time.sleep(fault.wait)
        began = time.monotonic()
        _, findings = diagnose(stack)
        took = time.monotonic() - began
    places = [place for place, line in enumerate(findings, 1) if re.search(fault.named, line)]
    if places:
        print(f"{fault.name:20} yes, {took:.1f} s, finding {places[0]} of {len(findings)}: {findings[places[0] - 1]}")
    else:
        print(f"{fault.name:20} NO, {took:.1f} s: {findings}")
    return bool(places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", action="append", choices=[fault.name for fault in FAULTS], help="only this one")
    parser.add_argument("--seed", type=int, default=None, help="of the order; else another one each time")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if not options.fault or fault.name in options.fault]
    random.Random(options.seed).shuffle(chosen)
    found = 0
    with TemporaryDirectory() as folder, Stack(prepare(EMBEDDED_MODEL), Path(folder)) as stack:
        for fault in chosen:
            wait_calm(stack)
            found += try_one(stack, fault)
            sys.stdout.flush()
    print(f"{found} of {len(chosen)} causes named by the first command")
    sys.exit(found != len(chosen))


if __name__ == "__main__":
    main()
