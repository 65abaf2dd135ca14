"""When a new request would get its first token: the queue played out by what steps were measured to cost. Pure.

A fluid model: prompts are computed in order, beside streams that get a token a step; who ends makes room for the next.
Preemptions, and memory that outputs take later, are left out.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from tidewright.engine.latency import LatencyController


class Work(NamedTuple):
    """What is left to do of a request, in tokens."""

    prompt: int  # to compute
    start: int  # that are computed, or that the prefix cache has
    output: int  # to generate, as expected
    blocks: int  # of the KV cache that it takes when it is admitted; it holds them until it ends
    target: float  # seconds that a step may take while it runs; inf: any


class Backlog(NamedTuple):
    running: Iterable[Work]
    waiting: Iterable[Work]  # before the new request, in order
    free_blocks: int
    places: int  # sequences that may run


def seconds_to_first_token(backlog: Backlog, own: Work, latency: LatencyController) -> float:
    decode = latency.cost.decode
    seconds, steps, free = 0.0, 0.0, backlog.free_blocks
    occupied = 0
    ends: list[tuple[float, int, float]] = []  # a heap, of streams: after how many steps each ends; blocks, target
    targets: Counter[float] = Counter()  # of streams

    def leave() -> None:
        nonlocal occupied, free
        _, blocks, target = heapq.heappop(ends)
        occupied -= 1
        free += blocks
        targets[target] -= 1
        if not targets[target]:
            del targets[target]

    for work, runs in _in_order(backlog, own):
        while not runs and ends and (occupied >= backlog.places or free < work.blocks):
            more = max(ends[0][0] - steps, 0.0)
            seconds += more * decode(len(ends))
            steps += more
            leave()
        occupied += 1
        free -= 0 if runs else work.blocks
        if work.prompt:
            streams = len(ends)
            prompt = latency.cost.prompt(work.start, work.prompt)
            target = min([work.target, *targets])
            more = prompt / latency.prompt_seconds(streams, target) if streams else 0.0
            seconds += prompt + more * decode(streams)
            steps += more
        heapq.heappush(ends, (steps + work.output, work.blocks, work.target))
        targets[work.target] += 1
        while ends and ends[0][0] <= steps:
            leave()
    return seconds + decode(len(ends))


def _in_order(backlog: Backlog, own: Work) -> Iterable[tuple[Work, bool]]:
    # Streams first: they go on beside all prompts.
    running = sorted(backlog.running, key=lambda work: work.prompt > 0)
    yield from ((work, True) for work in running)
    yield from ((work, False) for work in backlog.waiting)
    yield own, False
