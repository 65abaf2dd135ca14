"""Weights in fewer bits on the engine alone, in turns: `python -m benchmarks.quantized_engine`; wants an idle machine.

Each scheme has an engine process of its own, without Triton. In each round they run W1, W2 and W4 of `tidewright
bench`, one after the other and each first in turn, after one round for warming up. Printed are each figure's median
and best, and the ratio to the first scheme: the median of the rounds' ratios, above 1 means better.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from tidewright.bench.compare import FIGURES
from tidewright.bench.targets import EngineTarget
from tidewright.bench.workloads import WORKLOADS, Run, token_ids
from tidewright.config import Settings
from tidewright.launch.prepare import prepare

PAUSE = 0.3  # seconds between two turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Settings().model)
    parser.add_argument("--schemes", nargs="+", default=["none", "int8", "int4-g64", "stored"], metavar="SCHEME[:HEAD]")
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2", "W4"], choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    folder = prepare(options.model)
    common = {"threads": options.threads, "kv_cache_memory": "512MiB"}
    targets: dict[str, EngineTarget] = {}
    found: dict[tuple[str, str], list[float]] = {}
    try:
        for name in options.schemes:
            scheme, _, head = name.partition(":")
            settings = Settings(quantization=scheme, quantize_head=head or "int8", **common)  # type: ignore[arg-type]
            targets[name] = EngineTarget(settings, folder)
        for number in range(options.rounds + 1):
            order = list(targets)
            order = order[number % len(order) :] + order[: number % len(order)]
            for workload in options.workloads:
                for name in order:
                    time.sleep(PAUSE)
                    requests = WORKLOADS[workload].requests(random.Random(f"{number} {workload}"), token_ids(folder))
                    run = Run.of(requests, targets[name].run(requests))
                    for label, of, figure, _ in FIGURES if number else ():
                        if of == workload:
                            found.setdefault((label, name), []).append(figure(run))
    finally:
        for target in targets.values():
            target.close()
    for (label, name), values in sorted(found.items(), key=lambda item: item[0][0]):
        more_is_better = label.endswith("tokens/s")
        pairs = zip(values, found[label, options.schemes[0]], strict=True)
        ratio = statistics.median(a / b if more_is_better else b / a for a, b in pairs)
        best = max(values) if more_is_better else min(values)
        print(f"{label:26} {name:16} median {statistics.median(values):9.1f}  best {best:9.1f}  {ratio:5.2f}x")


if __name__ == "__main__":
    main()
