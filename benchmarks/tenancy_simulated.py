"""Shares and first tokens of tenants on a clock of its own, so that nothing else on the machine counts.

The real scheduler and latency controller; instead of a model, a formula says how long a step takes: that of
SmolLM2-135M on two cores. `shares` is as in tenancy_shares, `ttft` as in tenancy_ttft, with more requests;
`long steps`: as if no newcomer were expected. `flood`: what the other tenant gets meanwhile.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import dataclass, field

from benchmarks.tenancy_scheduling import result
from benchmarks.tenancy_shares import MIXES, error, tenants
from benchmarks.tenancy_ttft import p99
from benchmarks.tenant_load import Tenant
from tidewright.engine.latency import LatencyController
from tidewright.engine.limits import SchedulerConfig
from tidewright.engine.newcomers import Newcomers
from tidewright.engine.scheduler import Scheduler
from tidewright.engine.sequence import Sequence
from tidewright.engine.step_cost import StepLoad
from tidewright.engine.targets import Targets
from tidewright.kv_cache.block_pool import BlockPool
from tidewright.schema import SamplingParams

BASE, STREAM, TOKEN, CONTEXT = 0.0126, 0.0014, 0.001, 2e-7  # seconds of a step, as in step_cost.py
VOCAB = 1000


@dataclass
class Simulation:
    running: int
    target: float = 0.0  # tpot_target; 0: prefill_step_time is 0.25
    expects: bool = True  # newcomers
    now: float = 0.0
    sent: dict[int, tuple[Tenant, float]] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        config = SchedulerConfig(16, 2048, self.running, 512, 8192, vocab_size=VOCAB)
        self.scheduler = Scheduler(config, BlockPool(4096))
        self.latency = LatencyController(0.25, Targets(tpot=self.target), 2048, self.running)
        self.newcomers = Newcomers(self.latency.cost)
        self.random, self.last = random.Random(0), 0

    def send(self, tenant: Tenant, at: float) -> int:
        self.last += 1
        sampling = SamplingParams(
            max_tokens=tenant.output, ignore_eos=True, temperature=0, tenant=tenant.name, tenant_weight=tenant.weight
        )
        prompt = self.random.choices(range(1, VOCAB), k=tenant.prompt)
        sequence = Sequence(self.last, prompt, sampling)
        self.scheduler.add(sequence)
        if self.expects:
            self.newcomers.submitted(sequence, at)
        self.sent[self.last] = tenant, at
        tenant.left += 1
        return self.last

    def step(self, mix: list[Tenant]) -> None:
        for tenant in mix:
            if tenant.left < tenant.least:
                for _ in range(tenant.burst):
                    self.send(tenant, self.now)
        running = self.scheduler.running
        pace = self.latency.pace(running)
        plan = self.scheduler.schedule(self.newcomers.shorten(pace, len(running), self.scheduler.waiting, self.now))
        load = StepLoad.of(plan)
        seconds = BASE + STREAM * load.streams + TOKEN * load.tokens + CONTEXT * load.context
        self.now += seconds
        self.latency.computed(load, seconds)
        for planned in plan.sequences:
            tenant, _ = self.sent[planned.request_id]
            tenant.cost += planned.count + bool(planned.draws)
        for output in self.scheduler.commit(plan, result(plan)):
            tenant, at = self.sent[output.request_id]
            if output.request_id not in self.begun:
                self.begun.add(output.request_id)
                tenant.firsts.append(self.now - at)
            if output.finish_reason:
                tenant.left -= 1
                del self.sent[output.request_id]
                self.begun.remove(output.request_id)


def shares(options: argparse.Namespace) -> None:
    print(f"{'weights':24} {'fairness':9} {'error':>7} {'points':>7}   shares", flush=True)
    for weights in MIXES:
        for fair in (True, False):
            simulation, mix = Simulation(options.running), tenants(weights, fair)
            while simulation.now < 10:
                simulation.step(mix)
            for tenant in mix:
                tenant.cost = 0.0
            while simulation.now < 10 + options.seconds:
                simulation.step(mix)
            found = [tenant.cost / sum(other.cost for other in mix) for tenant in mix]
            part, points = error(found, weights)
            listed = " ".join(f"{share:.3f}" for share in found)
            name = ":".join(map(str, weights))
            print(f"{name:24} {'yes' if fair else 'no':9} {part:7.1%} {points:7.1%}   {listed}", flush=True)


def first_tokens(simulation: Simulation, quiet: Tenant, flood: Tenant, requests: int) -> list[float]:
    """Of `quiet`, which asks for less than its share, in seconds and sorted. It is alone for 10 s."""
    next_at, began = 20.0, 30.0
    while len(quiet.firsts) < requests:
        before = simulation.now
        if quiet.left or (flood.least and simulation.now > began):
            simulation.step([flood] if simulation.now > began else [])
        else:
            simulation.now = before = next_at
        # It came while that step ran.
        if next_at <= simulation.now and not quiet.left:
            simulation.send(quiet, max(next_at, before))
            next_at = simulation.now + 1.5 + 3 * simulation.random.random()
    return sorted(quiet.firsts)


def ttft(options: argparse.Namespace) -> None:
    print("\nprompt  tpot target  beside the flood    p50, s   p99, s   p99 / alone   flood, tokens/s", flush=True)
    for target in (0.0, 0.1, 0.05):
        for prompt in (64, 512):
            alone = 0.0
            for what in ("alone", "with fairness", "long steps", "without fairness"):
                simulation = Simulation(options.running, target, expects=what != "long steps")
                fair = what != "without fairness"
                quiet = Tenant("quiet" if fair else "", 1, prompt, output=4, least=0)
                least = 0 if what == "alone" else 32
                flood = Tenant("flood" if fair else "", 1, prompt=1000, output=64, least=least)
                found = first_tokens(simulation, quiet, flood, options.requests if fair else 20)
                alone = alone or p99(found)
                print(
                    f"{prompt:6}  {target:11g}  {what:16} {statistics.median(found):9.3f} {p99(found):8.3f} "
                    f"{p99(found) / alone:13.2f}  {flood.cost / simulation.now:16.0f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each mix")
    parser.add_argument("--requests", type=int, default=300, help="of the quiet tenant")
    options = parser.parse_args()
    shares(options)
    ttft(options)


if __name__ == "__main__":
    main()
