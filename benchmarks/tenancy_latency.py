"""Latency targets: gaps of streams beside a long prompt, and goodput under twice the load that can be served.

The engine in this process, without Triton, on one clock. `gap`: streams run, a long prompt comes; with a
tpot_target, with prefill_step_time alone, and with neither. Target: no gap over twice tpot_target. `goodput`: requests
that got their first token and their further ones within both targets, with and without prediction (ttft_target), the
same arrivals. Target: at least 1.5 times as many with it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from tidewright.bench.workloads import token_ids
from tidewright.cache import EMBEDDED_MODEL
from tidewright.config import Settings
from tidewright.distributed.placement import place
from tidewright.engine.engine import Engine
from tidewright.engine.messages import Submit
from tidewright.launch.prepare import prepare
from tidewright.schema import SamplingParams

GOODPUT, GAP = 1.5, 2.0


@dataclass
class Request:
    due: float
    prompt: list[int]
    output: int
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)  # between two tokens
    ended: bool = False
    refused: bool = False

    def met(self, ttft: float, tpot: float) -> bool:
        per_token = (self.last - self.first) / max(self.tokens - 1, 1)
        return self.ended and not self.refused and self.first - self.due <= ttft and per_token <= tpot


class Load:
    def __init__(self, folder: Path, **options: object) -> None:
        settings = Settings(kv_cache_memory="512MiB", **options)  # type: ignore[arg-type]
        self.engine = Engine(place(settings.engine_config(folder), 0))
        self._requests: dict[int, Request] = {}

    def send(self, request: Request) -> None:
        number = len(self._requests)
        self._requests[number] = request
        sampling = SamplingParams(temperature=0, max_tokens=request.output, ignore_eos=True, seed=0)
        refusal = self.engine.submit(Submit(number, request.prompt, sampling))
        if refusal and refusal.finish_reason != "overloaded":
            raise SystemExit(refusal.message)
        request.refused = request.ended = refusal is not None

    def step(self) -> None:
        outputs = self.engine.step()
        now = time.monotonic()
        for output in outputs:
            request = self._requests[output.request_id]
            if output.token_ids:
                if request.first:
                    request.gaps.append(now - request.last)
                request.first, request.last = request.first or now, now
                request.tokens += len(output.token_ids)
            request.ended = output.finish_reason is not None

    def serve(self, requests: list[Request]) -> None:
        """Each when it is due, in this order; until all have ended."""
        coming = iter(requests)
        following = next(coming, None)
        while following or self.engine.has_work:
            while following and following.due <= time.monotonic():
                self.send(following)
                following = next(coming, None)
            if self.engine.has_work:
                self.step()
            elif following:
                time.sleep(max(following.due - time.monotonic(), 0.0))

    def abort(self) -> None:
        for number, request in self._requests.items():
            if not request.ended:
                self.engine.abort(number)


def gap(folder: Path, streams: int, length: int, tpot: float, **options: object) -> tuple[float, float, float, float]:
    """Of any stream's gaps meanwhile the longest and the 99th percentile; the mean step; and the long prompt's wait."""
    load, draw, ids = Load(folder, **options), random.Random(0), token_ids(folder)
    now = time.monotonic()
    # What the server has learned after some traffic.
    load.serve([Request(now, draw.choices(ids, k=300), 8) for _ in range(4)])
    running = [Request(now, draw.choices(ids, k=32), 7000) for _ in range(streams)]
    for request in running:
        load.send(request)
    while min(request.tokens for request in running) < 10:
        load.step()
    for request in running:
        request.gaps.clear()
    long = Request(time.monotonic(), draw.choices(ids, k=length), 1)
    load.send(long)
    steps = 0
    while not long.first:
        load.step()
        steps += 1
    load.abort()
    took = long.first - long.due
    gaps = sorted(gap for request in running for gap in request.gaps)
    return gaps[-1], gaps[int(0.99 * (len(gaps) - 1))], took / steps, took


def arrivals(ids: list[int], rate: float, seconds: float, seed: int) -> list[Request]:
    draw, at, requests = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        requests.append(Request(at, draw.choices(ids, k=draw.randint(32, 256)), draw.randint(8, 48)))
    return requests


def capacity(folder: Path, running: int, tpot: float) -> float:
    """Requests per second that are served when more wait."""
    load = Load(folder, max_running=running, tpot_target=tpot)
    requests = arrivals(token_ids(folder), 1.0, 8.0 * running, seed=2)
    began = time.monotonic()
    for request in requests:
        request.due = began
        load.send(request)
    while load.engine.scheduler.stats().waiting:
        load.step()
    served = sum(request.ended for request in requests) / (time.monotonic() - began)
    load.abort()
    return served


def goodput(folder: Path, requests: list[Request], targets: tuple[float, float], **options: object) -> list[Request]:
    load = Load(folder, tpot_target=targets[1], **options)
    draw, ids = random.Random(3), token_ids(folder)
    load.serve([Request(0.0, draw.choices(ids, k=100), 16) for _ in range(12)])  # some traffic, to be measured
    began = time.monotonic() + 0.1
    for request in requests:
        request.due += began
    load.serve(requests)
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--only", choices=["gap", "goodput"])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--length", type=int, default=8000, help="of the long prompt, in tokens")
    parser.add_argument("--tpot-target", type=float, default=0.2)
    parser.add_argument("--ttft-target", type=float, default=3.0)
    parser.add_argument("--running", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0, help="in which requests come")
    parser.add_argument("--repetitions", type=int, default=1)
    options = parser.parse_args()
    folder, tpot, ttft = prepare(options.model), options.tpot_target, options.ttft_target
    if options.only != "goodput":
        ways: dict[str, dict[str, object]] = {
            f"tpot_target {tpot:g}": {"tpot_target": tpot},
            "prefill_step_time 0.25": {},
            "neither": {"prefill_step_time": 0.0},
        }
        print(f"{options.streams} streams, a prompt of {options.length} tokens; seconds", flush=True)
        print(f"{'':24} longest gap   99 % of them   mean step   first token of the long prompt", flush=True)
        found: dict[str, list[tuple[float, float, float, float]]] = {way: [] for way in ways}
        for _ in range(options.repetitions):
            for way, more in ways.items():
                found[way].append(gap(folder, options.streams, options.length, tpot, **more))
        for way, each in found.items():
            longest, most, step, first = (statistics.median(values) for values in zip(*each, strict=True))
            over = f"   over {GAP:g} x the target" if way.startswith("tpot") and longest > GAP * tpot else ""
            print(f"{way:24} {longest:11.2f} {most:14.2f} {step:11.3f} {first:32.1f}{over}", flush=True)
    if options.only != "gap":
        served = capacity(folder, options.running, tpot)
        print(f"\n{served:.2f} requests/s are served; {2 * served:.2f} come for {options.seconds:g} s", flush=True)
        print(f"within ttft {ttft:g} s and tpot {tpot:g} s: met, of which refused, ratio", flush=True)
        counts = {}
        for way, target in (("without prediction", 0.0), ("with prediction", ttft)):
            requests = arrivals(token_ids(folder), 2 * served, options.seconds, seed=1)
            goodput(folder, requests, (ttft, tpot), max_running=options.running, ttft_target=target)
            counts[way] = sum(request.met(ttft, tpot) for request in requests)
            refused = sum(request.refused for request in requests)
            late = sum(not request.refused and request.first - request.due > ttft for request in requests)
            print(
                f"{way:20} {counts[way]:4} of {len(requests)} met, {refused} refused, {late} late at first, "
                f"{counts[way] / options.seconds:.2f}/s",
                flush=True,
            )
        ratio = counts["with prediction"] / max(counts["without prediction"], 1)
        print(f"ratio {ratio:.2f}{'' if ratio >= GOODPUT else f'   under the target of {GOODPUT:g}'}", flush=True)


if __name__ == "__main__":
    main()
