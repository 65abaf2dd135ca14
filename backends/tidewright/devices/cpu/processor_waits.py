"""How long the compute threads were ready to run without a processor, as Linux counts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tidewright.cores import Quota

TASKS = Path("/proc/self/task")


class ProcessorWaits:
    """Reads `schedstat` of the threads that `thread_ids` names.

    What a CPU quota takes is no wait for a processor that others use: fewer threads would not get more of it.
    """

    def __init__(self, thread_ids: Callable[[], Iterable[int]], quota: Quota | None, tasks: Path = TASKS) -> None:
        self._thread_ids, self._quota, self._tasks = thread_ids, quota, tasks
        self._before: dict[int, float] = {}
        self._throttled = 0.0
        self.seconds()

    @property
    def known(self) -> bool:
        """Whether this kernel counts them."""
        return bool(self._before)

    def seconds(self) -> float:
        """Since the last call, the sum over threads; a thread counts from the first call on that finds it."""
        now = {thread: waited for thread in self._thread_ids() if (waited := self._waited(thread)) is not None}
        waited = sum(seconds - self._before.get(thread, seconds) for thread, seconds in now.items())
        self._before = now
        throttled = self._quota.throttled() if self._quota else 0.0
        by_quota, self._throttled = throttled - self._throttled, throttled
        return max(0.0, waited - by_quota)

    def _waited(self, thread: int) -> float | None:
        try:
            _, waited, _ = (self._tasks / str(thread) / "schedstat").read_text().split()
            return int(waited) / 1e9
        except (OSError, ValueError):  # it has ended, or the kernel does not count
            return None
