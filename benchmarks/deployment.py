"""What clients notice of a rolling update, and how long a pod takes to start: `python -m benchmarks.deployment`.

Runs the overlay cpu-demo as tests/deployment does: pods are processes in network namespaces. Needs root, iproute2 and
an idle machine. One thread a replica, float32, the model prepared; the manifests' own waits. Printed are

- the cold start of a replica, from the start of its container's process to its first token through all models (asked
  for 20 times a second), and until the pod is ready, by its probes and their periods;
- a rolling update of the replicas, and one of the gateways, under streams: how long it took, how many requests failed
  or had another text, the longest gap within a stream, and the latency of requests, beside the same load undisturbed,
  half of it before and half after.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from deployment.kubelet.manifests import K8S, overlay, patch, render
from deployment.load import PROMPTS, Load, Stream
from deployment.stack import GATEWAYS, REPLICAS, Stack, variable
from tidewright.launch.control import post
from tidewright.launch.errors import LaunchError

PATIENCE = 900.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="Starts of a pod to time.")
    parser.add_argument("--only-starts", action="store_true", help="No updates.")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--streams", type=int, default=len(PROMPTS), choices=range(1, len(PROMPTS) + 1))
    parser.add_argument(
        "--calm", type=float, default=30.0, help="Seconds of undisturbed load, before and after each update."
    )
    options = parser.parse_args()
    with Stack() as stack, tempfile.TemporaryDirectory() as folder:
        own = [
            patch(*REPLICAS, variable("TIDEWRIGHT_DTYPE", "float32")),
            patch(*GATEWAYS, variable("TIDEWRIGHT_GATEWAY_CACHE_SIZE", "0")),
        ]
        counts = [{"name": REPLICAS[1], "count": 1}]
        stack.apply([*render(overlay(Path(folder) / "demo", K8S / "overlays/cpu-demo", patches=own, replicas=counts))])
        stack.apply([stack.secret])
        stack.wait_until(stack.is_up, PATIENCE)
        cold_starts(stack, options.starts)
        if options.only_starts:
            return
        stack.scale(*REPLICAS, options.replicas)
        stack.wait_until(stack.is_up, PATIENCE)
        prompts = PROMPTS[: options.streams]
        texts = {stream.prompt: stream.text for stream in Load(stack, stack.key, prompts).once()}
        for name, what in (("replicas", REPLICAS), ("gateways", GATEWAYS)):
            calm = load_during(stack, prompts, lambda: time.sleep(options.calm))
            began = time.monotonic()
            moved = load_during(stack, prompts, lambda what=what: update(stack, what))  # type: ignore[misc]
            seconds = time.monotonic() - began
            calm += load_during(stack, prompts, lambda: time.sleep(options.calm))
            report(name, seconds, calm, moved, texts)


def cold_starts(stack: Stack, count: int) -> None:
    """Of the only replica, again and again."""
    answered, ready = [], []
    for _ in range(count):
        (old,) = stack.pods(*REPLICAS)
        stack.restart(*REPLICAS)
        old.join()
        stack.wait_until(lambda: stack.pods(*REPLICAS) and stack.pods(*REPLICAS)[0].container().running, PATIENCE)
        (pod,) = stack.pods(*REPLICAS)
        began = pod.container().began_at
        with stack.network.node.inside():
            while not answers(f"http://{pod.host.address}:8000/v2/models/generate/generate"):
                time.sleep(0.05)
        answered.append(time.monotonic() - began)
        stack.wait_until(lambda: stack.is_rolled_out(*REPLICAS), PATIENCE)
        ready.append(pod.container().ready_at - began)
    print(f"cold start of a replica, {count} times, in seconds")
    for name, figures in (("to its first token", answered), ("until the pod is ready", ready)):
        print(f"  {name:23} p50 {statistics.median(figures):5.2f}  min {min(figures):5.2f}  max {max(figures):5.2f}")


def answers(url: str) -> bool:
    try:
        post(url, {"text_input": "Hello", "max_tokens": 1, "temperature": 0.0}, 30)
    except LaunchError:
        return False
    return True


def load_during(stack: Stack, prompts: tuple[str, ...], act: Callable[[], None]) -> list[Stream]:
    with Load(stack, stack.key, prompts) as load:
        act()
    return load.done


def update(stack: Stack, what: tuple[str, str]) -> None:
    stack.restart(*what)
    stack.wait_until(lambda: stack.is_rolled_out(*what), PATIENCE)


def report(name: str, seconds: float, calm: list[Stream], moved: list[Stream], texts: dict[str, str]) -> None:
    print(f"rolling update of the {name}: {seconds:.0f} s, with the end of the last streams")
    for when, streams in (("undisturbed", calm), ("during it", moved)):
        failed = sum(bool(stream.error) for stream in streams)
        others = sum(stream.text != texts[stream.prompt] for stream in streams if not stream.error)
        whole, first = ([one.times[which] for one in streams if one.times] for which in (-1, 0))
        gap = max(one.longest_gap for one in streams)
        print(
            f"  {when:12} {len(streams):5} requests, {failed} failed, {others} with another text;"
            f" longest gap {gap:.2f} s; whole: p50 {statistics.median(whole):.2f} s, p99 {p99(whole):.2f} s;"
            f" first token: p50 {statistics.median(first):.2f} s, p99 {p99(first):.2f} s"
        )


def p99(figures: list[float]) -> float:
    return sorted(figures)[min(len(figures) - 1, int(len(figures) * 0.99))]


if __name__ == "__main__":
    main()
