"""parent_death.py: a grandchild whose parent is killed ends, even in the middle of something."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import psutil

CHILD = textwrap.dedent(
    """
    import time
    from tidewright.parent_death import exit_with_parent
    exit_with_parent(0.1)
    print("up", flush=True)
    time.sleep(60)
    """
)
PARENT = textwrap.dedent(
    f"""
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
    child.stdout.readline()
    print(child.pid, flush=True)
    time.sleep(60)
    """
)


def test_a_process_ends_with_its_parent_and_not_before() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert psutil.wait_procs([child], timeout=0.5)[1] == [child]
        parent.kill()
        assert not psutil.wait_procs([child], timeout=20)[1]
