"""What share of the service each of several tenants gets, beside what its weight says.

The engine process without Triton. All tenants always want more: of each mix the first floods with long prompts, the
second sends bursts, the others send a request when one has ended. A token of a prompt costs 1, one of an output 2.
`error` is the largest difference between a tenant's share of the cost and what it should be, as a part of the latter,
and in points of all that was computed. The same without tenants (`no fairness`) is beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.tenant_load import Load, Tenant, loaded
from tidewright.cache import EMBEDDED_MODEL
from tidewright.launch.prepare import prepare

TARGET = 0.05
MIXES: tuple[tuple[int, ...], ...] = ((1, 1), (1, 2, 4), (1, 1, 1, 1), (1, 2, 4, 1), (1,) * 8, (1, 2, 4, 1, 2, 4, 1, 2))


def tenants(weights: Sequence[int], fair: bool) -> list[Tenant]:
    found = []
    for number, weight in enumerate(weights):
        name = f"tenant {number}" if fair else ""
        if number == 0:
            found.append(Tenant(name, weight, prompt=200, output=8, least=48))
        elif number == 1:
            found.append(Tenant(name, weight, prompt=32, output=24, least=30, burst=60))
        else:
            found.append(Tenant(name, weight, prompt=48, output=16, least=20))
    return found


def shares(load: Load, mix: list[Tenant], warm_up: float, seconds: float) -> list[float]:
    load.run(mix, warm_up)
    for tenant in mix:
        tenant.cost = 0.0
    load.run(mix, seconds)
    load.drop()
    total = sum(tenant.cost for tenant in mix)
    return [tenant.cost / total for tenant in mix]


def error(found: Sequence[float], weights: Sequence[int]) -> tuple[float, float]:
    """As a part of what it should be, and in points."""
    ideal = [weight / sum(weights) for weight in weights]
    points = [abs(one - other) for one, other in zip(found, ideal, strict=True)]
    return max(one / other for one, other in zip(points, ideal, strict=True)), max(points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=10.0)
    parser.add_argument("--running", type=int, default=8)
    parser.add_argument("--mixes", type=int, nargs="+", default=[*range(len(MIXES))], help="numbers of mixes")
    parser.add_argument("--unfair", type=int, nargs="*", default=[0, 3], help="those also measured without fairness")
    options = parser.parse_args()
    print(f"{'weights':24} {'fairness':9} {'error':>7} {'points':>7}   shares", flush=True)
    with loaded(prepare(options.model), max_running=options.running) as load:
        for number in options.mixes:
            weights = MIXES[number]
            for fair in (True, False) if number in options.unfair else (True,):
                found = shares(load, tenants(weights, fair), options.warm_up, options.seconds)
                part, points = error(found, weights)
                listed = " ".join(f"{share:.3f}" for share in found)
                print(
                    f"{':'.join(map(str, weights)):24} {'yes' if fair else 'no':9} {part:7.1%} {points:7.1%}   {listed}"
                    f"{'' if part <= TARGET or not fair else '   over the target'}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
