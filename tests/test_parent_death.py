"""parent_death.py: a process whose parent is killed ends, even in the middle of something, and so does one stuck."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

CHILD = textwrap.dedent(
    """
    import os, sys, time
    from tidewright.parent_death import exit_with_parent
    def missing(pid):
        raise OSError("not in this kernel")
    if sys.argv[1] == "old":
        os.pidfd_open = missing
    exit_with_parent(0.1)
    print("up", flush=True)
    time.sleep(60)
    """
)
PARENT = textwrap.dedent(
    f"""
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", {CHILD!r}, sys.argv[1]], stdout=subprocess.PIPE)
    child.stdout.readline()
    print(child.pid, flush=True)
    time.sleep(60)
    """
)


@pytest.mark.parametrize("kernel", ["new", "old"])
def test_a_process_ends_with_its_parent_and_not_before(kernel: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, kernel], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert psutil.wait_procs([child], timeout=0.5)[1] == [child]
        parent.kill()
        assert not psutil.wait_procs([child], timeout=20)[1]


def test_a_process_whose_end_hangs_is_ended() -> None:
    hangs = textwrap.dedent(
        """
        import threading
        from tidewright.parent_death import end_within
        threading.Thread(target=threading.Event().wait).start()
        end_within(0.5)
        """
    )
    assert subprocess.run([sys.executable, "-c", hangs], timeout=20).returncode == -signal.SIGALRM
