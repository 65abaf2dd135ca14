"""Whose grammar is made next: tenants get the compiler's time in proportion to their weights. Pure.

The queue is that of fairness.py, so its bounds hold; what a grammar costs is known once it is made.
"""

from __future__ import annotations

from tidewright.engine.fairness import FairQueue
from tidewright.engine.messages import Submit
from tidewright.engine.sequence import Sequence


class GrammarTurns:
    def __init__(self) -> None:
        self._queue = FairQueue()
        self._requests: dict[Sequence, Submit] = {}  # by what stands for each in the queue
        self._arrivals = 0
        self._making: Sequence | None = None

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def put(self, request: Submit) -> None:
        entry = Sequence(request.request_id, [], request.sampling)
        entry.order = (request.sampling.priority, self._arrivals)
        self._arrivals += 1
        self._requests[entry] = request
        self._queue.add(entry)

    def take(self) -> Submit:
        """Of those that wait, the one whose turn it is. `made` must follow before the next is taken."""
        assert self._making is None
        self._making = self._queue.first()
        assert self._making
        self._queue.begin(self._making)
        return self._requests.pop(self._making)

    def made(self, cost: int) -> None:
        """What `take` gave took so long, in whatever unit."""
        assert self._making
        self._making.num_computed = cost
        self._queue.charge([self._making], draws=False)
        self._queue.end_step()
        self._queue.end(self._making, ran=True)
        self._making = None
