"""Makes the grammars of guided requests in a thread of its own, before the requests enter the scheduler.

One takes up to a tenth of a second: fifty of them in one step stopped everyone else for a second. A request
enters the scheduler when its grammar is ready, as an input like any other: all ranks see the same order. Tenants take
turns (engine/grammar_turns.py), so one's many costly grammars delay another's by one or two of them.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from tidewright.engine.grammar_turns import GrammarTurns
from tidewright.engine.messages import SequenceOutput, Submit
from tidewright.engine.vital_thread import start_vital_thread
from tidewright.schema import SamplingParams


@dataclass(frozen=True)
class Compiled:
    request: Submit
    error: str = ""

    @property
    def refusal(self) -> SequenceOutput | None:
        return SequenceOutput(self.request.request_id, [], "invalid", message=self.error) if self.error else None


class GrammarCompiler:
    """`put`, `drop`, `take` and `tenants` are for one thread."""

    def __init__(
        self,
        make: Callable[[int, SamplingParams], None],
        done: Callable[[Compiled], None],
        tell: Callable[[str], None],
    ) -> None:
        """`make`: the grammar of a request id; `done`: called in the compiler's thread.

        Should the thread fail, `tell` is called with the cause and the process ends.
        """
        self._make, self._done, self._tell = make, done, tell
        self._requests: queue.SimpleQueue[Submit] = queue.SimpleQueue()
        self._wanted: dict[int, str] = {}  # requests, and their tenants
        self._is_started = False

    def put(self, request: Submit) -> None:
        if not self._is_started:
            self._is_started = True
            start_vital_thread("grammars", self._loop, self._tell)
        self._wanted[request.request_id] = request.sampling.tenant
        self._requests.put(request)

    def drop(self, request_id: int) -> None:
        """The request is no longer wanted, if it is here."""
        self._wanted.pop(request_id, None)

    @property
    def tenants(self) -> Collection[str]:
        """Of the requests that wait here."""
        return self._wanted.values()

    def take(self, compiled: Compiled) -> bool:
        """Whether a request that was `done` is still wanted."""
        return self._wanted.pop(compiled.request.request_id, None) is not None

    def _loop(self) -> None:
        turns = GrammarTurns()
        while True:
            self._take_in(turns)
            request = turns.take()
            began = time.thread_time_ns()
            error = ""
            if request.request_id in self._wanted:
                try:
                    self._make(request.request_id, request.sampling)
                except Exception as failure:  # whatever it is: it is one request's grammar
                    error = f"guided output failed: {failure}"
            cost = time.thread_time_ns() - began
            if not self._requests.empty():
                self._take_in(turns)  # they came before this one's tenant has paid for it, and may be next
            turns.made(cost)
            self._done(Compiled(request, error))

    def _take_in(self, turns: GrammarTurns) -> None:
        """All that came in meanwhile; waits for it while there is nothing."""
        while not len(turns) or not self._requests.empty():
            turns.put(self._requests.get())
