"""The KV cache in bfloat16, int8 and fp8: time of decode, in turns, memory, and perplexity.

    python -m benchmarks.kv_cache_dtypes
    python -m benchmarks.kv_cache_dtypes --model FOLDER
    python -m benchmarks.kv_cache_dtypes --model FOLDER --perplexity docs/*.md

Without a model: rotation, cache write and attention in the shapes of SmolLM2-135M, of all layers in turn; with one,
whole steps. Perplexity is that of prompts of 1,024 tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tidewright.attention.base import AttentionLayer, Rotation
from tidewright.devices.cpu.memory import CpuMemory
from tidewright.devices.registry import cache_dtype_of, make_device
from tidewright.engine.engine import Engine
from tidewright.engine.messages import EngineConfig, Submit
from tidewright.engine.model_runner import ModelRunner
from tidewright.engine.plan import Draw, ScheduledSequence, StepPlan
from tidewright.kv_cache.quantized import quantize
from tidewright.kv_cache.storage import KVCache, KVCacheShape
from tidewright.schema import SamplingParams
from tidewright.step.buffers import StepBuffers, StepLimits
from tidewright.tokenization import Tokenizer

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 30, 9, 3, 64
BLOCK_SIZE = 16
FORMATS = ("bfloat16", "int8", "fp8")


def fill(cache: KVCache) -> None:
    """With what random keys and values become."""
    torch.manual_seed(0)
    for layer in cache.layers:
        scaled = (
            (layer.keys_NSKD, layer.key_scales_NKS),
            (layer.values_NSKD, layer.value_scales_NKS),
        )
        for numbers, scales in scaled:
            made = torch.randn(numbers.shape)
            if scales is None:
                numbers.copy_(made)
                continue
            codes, own = quantize(made, numbers.dtype)
            numbers.copy_(codes)
            scales.copy_(own.transpose(1, 2))


def plan(sequences: int, context: int) -> StepPlan:
    blocks = context // BLOCK_SIZE + 1
    params = SamplingParams(temperature=0)
    return StepPlan(
        tuple(
            ScheduledSequence(
                i, context, (5 + i,), tuple(range(i * blocks, (i + 1) * blocks)), (Draw(i, params, context + 1),)
            )
            for i in range(sequences)
        )
    )


def attention_of(name: str, dtype: torch.dtype, sequences: int, context: int) -> Callable[[], object]:
    cache_dtype = cache_dtype_of(name, dtype)
    shape = KVCacheShape(LAYERS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, cache_dtype)
    blocks = context // BLOCK_SIZE + 1
    cache = KVCache(shape, sequences * blocks, CpuMemory())
    fill(cache)
    attention = make_device("cpu", "auto", BLOCK_SIZE, dtype, HEAD_DIM, cache_dtype=cache_dtype).attention
    limits = StepLimits(sequences, sequences, blocks * BLOCK_SIZE, BLOCK_SIZE)
    batch = StepBuffers(limits, torch.device("cpu")).fill(plan(sequences, context))
    tables = (torch.randn(context + 1, HEAD_DIM) for _ in range(2))
    rotation, layer = Rotation(*tables, batch.positions_T), AttentionLayer(HEAD_DIM**-0.5)
    qkv_TXD = torch.randn(sequences, HEADS + 2 * KV_HEADS, HEAD_DIM).to(dtype)

    def run() -> None:
        attention.prepare(batch)
        for own in cache.layers:
            attention.forward(qkv_TXD, rotation, own, batch, layer)

    return run


def step_of(name: str, model: str, sequences: int, context: int, threads: int) -> Callable[[], object]:
    blocks = sequences * (context // BLOCK_SIZE + 1)
    config = EngineConfig(
        model_dir=model,
        kv_cache_dtype=name,
        kv_cache_memory=f"{blocks * BLOCK_SIZE * 24 // 1024 + 1}MiB",
        max_running=sequences,
        max_model_len=context + BLOCK_SIZE,
        threads=threads,
    )
    runner = ModelRunner(config)
    fill(runner.kv_cache)
    step = plan(sequences, context)
    return lambda: runner.launch(step).result()


def perplexity(name: str, dtype: str, model: str, prompts: Sequence[list[int]]) -> float:
    config = EngineConfig(model_dir=model, dtype=dtype, kv_cache_dtype=name, kv_cache_memory="256MiB", max_running=4)
    engine = Engine(config)
    for number, ids in enumerate(prompts):
        refused = engine.submit(
            Submit(number, ids, SamplingParams(temperature=0, max_tokens=1, seed=0, prompt_logprobs=0))
        )
        assert refused is None
    total = count = 0.0
    while engine.has_work:
        for output in engine.step():
            for entries in output.prompt_logprobs or ():
                total -= entries[0].logprob
                count += 1
    return math.exp(total / count)


def report_perplexity(model: str, dtype: str, files: Sequence[str], most: int) -> None:
    text = "\n".join(Path(file).read_text() for file in files)
    ids = Tokenizer(Path(model)).encode(text, add_special_tokens=False)[:most]
    prompts = [ids[i : i + 1024] for i in range(0, len(ids) - 1, 1024)]
    found = {name: perplexity(name, dtype, model, prompts) for name in FORMATS}
    print(f"perplexity of {len(ids)} tokens, computed in {dtype}")
    for name, value in found.items():
        print(f"{name:10} {value:9.4f} {100 * (value / found['bfloat16'] - 1):+7.3f} %")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Folder of a model; empty: attention alone.")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--context", type=int, default=2000, help="Tokens of each sequence.")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes.")
    parser.add_argument("--processor-time", action="store_true", help="Of one thread, for a machine with other work.")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--perplexity", nargs="+", metavar="FILE", help="Of these texts, instead of time.")
    parser.add_argument("--tokens", type=int, default=20480, help="Of the texts, at most.")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    threads = 1 if options.processor_time else options.threads
    clock = time.process_time if options.processor_time else time.perf_counter
    if threads:
        torch.set_num_threads(threads)
    if options.perplexity:
        report_perplexity(options.model, options.dtype, options.perplexity, options.tokens)
        return
    runs: dict[str, Callable[[], object]] = {}
    for name in FORMATS:
        if options.model:
            runs[name] = step_of(name, options.model, options.sequences, options.context, threads)
        elif name not in ("bfloat16", "float32") or name == options.dtype:
            runs[name] = attention_of(name, dtype, options.sequences, options.context)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats + 1):
        for name, run in runs.items():
            began = clock()
            run()
            times[name].append(clock() - began)
    what = "whole steps" if options.model else f"attention of {LAYERS} layers"
    print(f"{what}, {options.sequences} contexts of {options.context} tokens, {torch.get_num_threads()} threads; ms")
    print(f"{'':10} {'median':>8} {'least':>8} {'to bf16':>8} {'bytes a token and layer':>24}")
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    for name, median in medians.items():
        size = KVCacheShape(1, KV_HEADS, HEAD_DIM, 1, cache_dtype_of(name, dtype)).bytes_per_block
        ratio = median / next(iter(medians.values()))
        print(f"{name:10} {1e3 * median:8.2f} {1e3 * min(times[name]):8.2f} {ratio:8.2f} {size:24}")


if __name__ == "__main__":
    main()
