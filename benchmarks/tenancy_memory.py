"""The KV cache resized under load, a budget at saturation, and a swap's gain. `python -m benchmarks.tenancy_memory`.

One engine in this process, without Triton. Requests come all at once, more than run at a time. Undisturbed, and with a
resize every few steps up and down between the least and the most: outputs are compared token by token, and printed is
how long the resizes held the engine up. Then the share of a budget that is in use while requests wait. Then, for
sequences of some lengths, what it takes to compute them anew after a preemption, and what copies of their blocks take.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tidewright.cache import EMBEDDED_MODEL
from tidewright.engine.engine import Engine
from tidewright.engine.messages import EngineConfig, Submit
from tidewright.engine.model_runner import ModelRunner
from tidewright.kv_cache.budget import mib
from tidewright.kv_cache.quantized import INT8, dequantize, quantize
from tidewright.launch.prepare import prepare
from tidewright.schema import SamplingParams

Outputs = dict[int, list[int]]
EVERY = 10  # steps between two resizes


def requests(count: int, prompt: int, output: int) -> list[Submit]:
    generator = random.Random(0)
    params = {"max_tokens": output, "ignore_eos": True, "seed": 7}
    return [
        Submit(
            number,
            generator.choices(range(100, 9000), k=prompt),
            SamplingParams(**params, temperature=float(number % 2)),  # type: ignore[arg-type]
        )
        for number in range(count)
    ]


def run(engine: Engine, submits: list[Submit], before_step: Callable[[int], object]) -> tuple[Outputs, int, float]:
    """Tokens by request, requests that failed, seconds."""
    tokens: Outputs = {one.request_id: [] for one in submits}
    failed = sum(engine.submit(one) is not None for one in submits)
    began = time.perf_counter()
    for number in itertools.count():
        if not engine.has_work:
            break
        before_step(number)
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            failed += output.finish_reason not in (None, "length")
    return tokens, failed, time.perf_counter() - began


def resizes(config: EngineConfig, submits: list[Submit]) -> None:
    engine = Engine(config)
    account = engine.memory.account()
    least, most = account.kv_least // account.block, account.most_blocks
    wanted, failed, alone = run(engine, submits, lambda _: None)
    print(f"undisturbed: {alone:.1f} s, {failed} failed, {engine.stats().preemptions} preemptions")
    engine = Engine(config)
    sizes = itertools.cycle((least, most, (least + most) // 2, most))
    pauses: list[float] = []

    def resize(number: int) -> None:
        if number % EVERY == EVERY - 1:
            began = time.perf_counter()
            engine.resize(next(sizes))
            pauses.append(1000 * (time.perf_counter() - began))

    tokens, failed, took = run(engine, submits, resize)
    same = sum(tokens[number] == wanted[number] for number in wanted)
    spread = f"{statistics.median(pauses):.2f} ms ({min(pauses):.2f}-{max(pauses):.2f})"
    print(
        f"{len(pauses)} resizes between {mib(account.kv_least)} and {mib(account.kv_most)}: {took:.1f} s, "
        f"{failed} failed, {same} of {len(wanted)} outputs equal, {engine.stats().preemptions} preemptions, "
        f"pause {spread}"
    )


def saturation(config: EngineConfig, submits: list[Submit]) -> None:
    engine = Engine(config)
    shares: list[tuple[float, float]] = []  # of the budget, and of the KV cache

    def look(_: int) -> None:
        if engine.stats().waiting:
            account = engine.memory.account()
            assert account.committed <= account.budget
            shares.append((account.utilisation, account.kv_used / account.kv_pool))

    _, failed, _ = run(engine, submits, look)
    account = engine.memory.account()
    full, of_cache = zip(*shares[len(shares) // 10 :], strict=True)  # once the first requests have been read
    print(
        f"budget {mib(account.budget)} (weights {mib(account.weights)}, workspace {mib(account.workspace)}, KV cache "
        f"{mib(account.kv_pool)}): {statistics.median(full):.1%} in use while requests wait "
        f"({min(full):.1%}-{max(full):.1%}), of the KV cache {statistics.median(of_cache):.1%}, {failed} failed"
    )


def swap(config: EngineConfig, lengths: list[int]) -> None:
    """On one cache: a copy of blocks to other memory and back, in their own numbers and as int8."""
    engine = Engine(config)
    assert isinstance(engine.runner, ModelRunner)
    layers, size = engine.runner.kv_cache.layers, config.block_size
    for length in lengths:
        submit = requests(1, length, 1)[0]
        recompute = measure(lambda one=submit: run(engine, [one], lambda _: None))  # type: ignore[misc]
        blocks = torch.randperm(engine.num_blocks)[: -(-length // size)]

        def copies(blocks: torch.Tensor = blocks) -> None:
            for layer in layers:
                for tensor in (layer.keys_NSKD, layer.values_NSKD):
                    tensor[blocks] = tensor[blocks]

        def codes(blocks: torch.Tensor = blocks) -> None:
            for layer in layers:
                for tensor in (layer.keys_NSKD, layer.values_NSKD):
                    tensor[blocks] = dequantize(*quantize(tensor[blocks], INT8), tensor.dtype)

        whole = len(blocks) * engine.runner.fixed_memory.block
        print(
            f"{length:5} tokens, {mib(whole):>9}: compute anew {recompute:7.1f} ms, copy out and in "
            f"{measure(copies):6.1f} ms, as int8 {measure(codes):6.1f} ms"
        )


def measure(call: Callable[[], Any], times: int = 3) -> float:
    """Milliseconds, the fastest of some."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - began))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    def config(**changes: Any) -> EngineConfig:
        values = {"dtype": options.dtype, "max_running": 16, "max_model_len": 256, "max_batched_tokens": 512}
        return EngineConfig(model_dir=str(prepare(options.model)), **(values | changes))

    submits = requests(options.requests, options.prompt, options.output)
    resizes(config(kv_cache_memory="48MiB"), submits)
    # Without a pace, so that memory alone is what requests wait for.
    crowded = config(memory_budget="480MiB", max_running=32, prefill_step_time=0)
    saturation(crowded, requests(2 * options.requests, options.prompt, options.output))
    swap(config(max_model_len=2048, prefix_caching=False), [256, 1024, 2000])


if __name__ == "__main__":
    main()
