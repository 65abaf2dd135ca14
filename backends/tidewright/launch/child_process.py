"""What the processes have in common that `serve` starts, watches and ends."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence

from tidewright.parent_death import signal_on_parent_death


class ChildProcess:
    """At most one at a time. It is told to end when the thread that started it ends, so that nothing outlives us."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self._process.poll() if self._process else None

    def _launch(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        piped: bool = False,
        inherited: Sequence[int] = (),
    ) -> None:
        """`piped`: its output and errors come through `_process.stdout`, else they go where ours go.

        `inherited`: file descriptors that it keeps open.
        """
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else None,
            stderr=subprocess.STDOUT if piped else None,
            pass_fds=inherited,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle, and the session finds orphans
            preexec_fn=_terminate_with_parent,
        )


def _terminate_with_parent() -> None:
    """In the child, before it begins."""
    signal_on_parent_death(signal.SIGTERM)
