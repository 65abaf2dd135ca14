"""What all users share: which request comes next, and what becomes of it. Protocols stand beside it."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from typing import Any, Protocol

import gevent
from locust import User, task

from loadtests import lengths
from loadtests.lengths import Lengths
from loadtests.options import Options
from loadtests.recording import Recorder
from loadtests.samples import MAX_ERROR, UNENDED, Sample
from loadtests.shapes import tenant_at

AFTER_FAILURE = 0.5  # seconds: a server that refuses all must not be asked as fast as the client can


class RequestError(Exception):
    """Why a request failed, in words that are the same for the same cause."""


class Tokens:
    """When the tokens of one answer came."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.first = self.last = self.longest_gap = 0.0
        self.prompt = self.output = 0

    def arrived(self) -> None:
        now = time.perf_counter() - self._began
        if self.first:
            self.longest_gap = max(self.longest_gap, now - self.last)
        else:
            self.first = now
        self.last = now


class Wanted:
    """One request."""

    def __init__(self, rng: random.Random, lengths: Lengths, key: str, leaves_after: int) -> None:
        self.rng, self.lengths, self.key = rng, lengths, key
        self.leaves_after = leaves_after
        """Arrivals after which the client leaves; 0: it does not."""


class Caller(Protocol):
    """One user's side of a protocol; it keeps its connection."""

    def call(self, wanted: Wanted, tokens: Tokens) -> bool:
        """Notes the tokens as they come. False: left in the middle, as was wanted.

        Raises:
            RequestError: it failed.
        """

    def close(self) -> None: ...


_alive: list[GenerationUser] = []
"""The users of this process, oldest first."""
_numbers = itertools.count()


class GenerationUser(User):
    """Sends one request after the other."""

    abstract = True
    protocol = ""
    make: Callable[[Options], Caller]

    def on_start(self) -> None:
        self._recorder: Recorder = self.environment.tidewright
        self._options = self._recorder.options
        runner: Any = self.environment.runner
        worker = getattr(runner, "worker_index", 0)
        self._rng = random.Random(f"{self._options.seed} {worker} {next(_numbers)}")
        self._caller = type(self).make(self._options)
        _alive.append(self)

    def on_stop(self) -> None:
        _alive.remove(self)
        self._caller.close()

    @task
    def generate(self) -> None:
        options, rng = self._options, self._rng
        if not self._recorder.begin():
            gevent.sleep(AFTER_FAILURE)
            return
        peak = max(1, options.users // self._recorder.processes)
        tenant = tenant_at(options.shape, _alive.index(self), peak, len(options.keys))
        if options.fixed:
            drawn = Lengths("fixed", *options.fixed)
        else:
            drawn = lengths.draw(rng, options.mix, options.scale, options.max_prompt, options.max_answer)
        leaves = rng.randint(1, drawn.answer) if rng.random() < options.cancel_share else 0
        at, tokens, error, cancelled = time.time(), Tokens(), "", False
        try:
            cancelled = not self._caller.call(Wanted(rng, drawn, options.keys[tenant], leaves), tokens)
        except RequestError as problem:
            error = str(problem)[:MAX_ERROR] or "failed"
        except Exception as problem:  # a fault of ours: it counts as a failure, and does not fill the terminal
            error = f"{type(problem).__name__} in the load generator: {problem}"[:MAX_ERROR]
        except gevent.GreenletExit:  # locust waits no longer
            self._note(at, drawn, tenant, tokens, UNENDED, False)
            raise
        self._note(at, drawn, tenant, tokens, error, cancelled)
        if error:
            gevent.sleep(AFTER_FAILURE)
        elif options.think:
            gevent.sleep(rng.expovariate(1 / options.think))

    def _note(self, at: float, drawn: Lengths, tenant: int, tokens: Tokens, error: str, cancelled: bool) -> None:
        sample = Sample(
            at=at,
            protocol=self.protocol,
            kind=drawn.kind,
            tenant=self._options.tenants[tenant],
            prompt_tokens=tokens.prompt,
            output_tokens=tokens.output,
            first=tokens.first,
            last=tokens.last,
            longest_gap=tokens.longest_gap,
            error=error,
            cancelled=cancelled,
        )
        self._recorder.take(sample)
