"""How long a quiet tenant waits for its first token beside one that floods the engine, and alone.

The engine process without Triton. The quiet tenant sends a request, waits for its end, and pauses; the other one always
has `--flood` requests of long prompts. `without fairness`: both are the same tenant. Target: p99 at most twice as long
as alone.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks.tenant_load import Load, Tenant, loaded
from tidewright.cache import EMBEDDED_MODEL
from tidewright.launch.prepare import prepare

TARGET = 2.0


def first_tokens(load: Load, quiet: Tenant, others: list[Tenant], requests: int, pause: float) -> list[float]:
    load.run(others, 5.0 if others else 0.0)
    quiet.firsts.clear()
    for number in range(requests):
        load.run(others, 300.0, until=load.send(quiet))
        load.run(others, pause * (0.5 + number % 7 / 7))  # at any time of the others' steps
    load.drop()
    return sorted(quiet.firsts)


def p99(values: list[float]) -> float:
    return values[min(int(0.99 * len(values)), len(values) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--unfair-requests", type=int, default=2)
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[64, 512], help="tokens of the quiet tenant's prompts"
    )
    parser.add_argument("--flood", type=int, default=32)
    parser.add_argument("--pause", type=float, default=0.5)
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--step-time", type=float, nargs="+", default=[0.25], help="prefill_step_time")
    options = parser.parse_args()
    print("prompt  step time  beside the flood    p50, s   p99, s   p99 / alone", flush=True)
    for step_time in options.step_time:
        with loaded(prepare(options.model), max_running=options.running, prefill_step_time=step_time) as load:
            for prompt in options.prompts:
                alone = 0.0
                for what, name, requests in (
                    ("alone", "quiet", options.requests),
                    ("with fairness", "quiet", options.requests),
                    ("without fairness", "", options.unfair_requests),
                ):
                    quiet = Tenant(name, 1, prompt, output=4, least=0)
                    flood = Tenant("flood" if name else "", 1, prompt=1000, output=64, least=options.flood)
                    others = [] if what == "alone" else [flood]
                    found = first_tokens(load, quiet, others, requests, options.pause)
                    alone = alone or p99(found)
                    ratio = p99(found) / alone
                    print(
                        f"{prompt:6}  {step_time:9g}  {what:16} {statistics.median(found):9.3f} {p99(found):8.3f} "
                        f"{ratio:13.2f}{'   over the target' if ratio > TARGET and name else ''}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
