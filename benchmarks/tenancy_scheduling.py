"""What it costs to schedule the sequences of several tenants, on one core.

The scheduler alone (`benchmarks.step_overhead` measures the rest): decodes with contexts of 2,000 tokens, and as many
requests that wait. Medians of processor time of `schedule` and `commit`, beside those of one tenant. Then, with a real
engine process, the share of its time that both take. Targets: 0.5 ms for 256 sequences, 2 % for 64 of 8 tenants.
"""

from __future__ import annotations

import argparse
import statistics
import time

from benchmarks.tenant_load import Tenant, loaded
from tidewright.cache import EMBEDDED_MODEL
from tidewright.engine.limits import SchedulerConfig
from tidewright.engine.plan import DrawnToken, SequenceResult, StepPlan, StepResult
from tidewright.engine.scheduler import Scheduler
from tidewright.engine.sequence import Sequence
from tidewright.kv_cache.block_pool import BlockPool
from tidewright.launch.prepare import prepare
from tidewright.schema import SamplingParams

TARGET_MS, TARGET_SHARE = 0.5, 0.02


def result(plan: StepPlan) -> StepResult:
    return StepResult(tuple(SequenceResult((DrawnToken(7),) * len(planned.draws)) for planned in plan.sequences))


def cost(running: int, tenants: int, context: int, steps: int) -> tuple[float, float]:
    """Milliseconds of `schedule` and of `commit`."""
    config = SchedulerConfig(16, 1 << 30, running, running, 4 * context, vocab_size=1000)
    scheduler = Scheduler(config, BlockPool(running * (context // 16 + 20)))
    for number in range(2 * running):
        prompt = [number % 900 + 1] * context
        tenant = f"tenant {number % tenants}" if tenants > 1 else ""
        sampling = SamplingParams(tenant=tenant, max_tokens=context, ignore_eos=True, temperature=0)
        scheduler.add(Sequence(number, prompt, sampling))
    planned, committed = [], []
    for step in range(steps + 5):
        began = time.thread_time()
        plan = scheduler.schedule()
        between = time.thread_time()
        computed = result(plan)
        resumed = time.thread_time()
        scheduler.commit(plan, computed)
        if step >= 5:
            planned.append(between - began)
            committed.append(time.thread_time() - resumed)
    assert [one.count for one in plan.sequences] == [1] * running
    return 1e3 * statistics.median(planned), 1e3 * statistics.median(committed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--running", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0, help="with the engine process; 0: without")
    options = parser.parse_args()
    print("running  tenants  schedule, ms  commit, ms", flush=True)
    for running in options.running:
        for tenants in options.tenants:
            schedule, commit = cost(running, tenants, options.context, options.steps)
            print(
                f"{running:7}  {tenants:7}  {schedule:12.3f}  {commit:10.3f}"
                f"{'   over the target' if schedule > TARGET_MS else ''}",
                flush=True,
            )
    if not options.seconds:
        return
    with loaded(prepare(options.model), max_running=64) as load:
        several = [Tenant(f"tenant {number}", 1, 32, 2000, least=8) for number in range(8)]
        load.run(several, 8.0)
        before, began = load.stats, time.perf_counter()
        load.run(several, options.seconds)
        seconds = load.stats.schedule_seconds - before.schedule_seconds
        share, steps = seconds / (time.perf_counter() - began), load.stats.steps - before.steps
        print(
            f"engine: {load.stats.running} running of 8 tenants, {1e3 * options.seconds / steps:.1f} ms a step, "
            f"of which {1e3 * seconds / steps:.2f} ms, {share:.2%}, for scheduling"
            f"{'   over the target' if share > TARGET_SHARE else ''}"
        )


if __name__ == "__main__":
    main()
