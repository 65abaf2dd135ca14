"""The CPU kernels beside torch, on the shapes of SmolLM2-135M. `python -m benchmarks.kernels`; needs an idle machine.

Matrix products run over the weights of all layers in turn, so that each comes from memory as in a real step.
"""

# ruff: noqa: B023 - a function made in a loop is called right there

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from tidewright.attention.base import AttentionLayer, Rotation
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.cpu.attention import NativeCpuAttention
from tidewright.devices.cpu.kernels import CpuKernels, kernels_of
from tidewright.engine.plan import ScheduledSequence, StepPlan
from tidewright.kv_cache.storage import LayerCache
from tidewright.step.buffers import StepBuffers, StepLimits

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 30, 576, 1536, 9, 3, 64, 49152
BLOCK_SIZE = 16
CPU = torch.device("cpu")


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The fastest of several runs: what the machine can do when nothing else disturbs it."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def line(what: str, moved: float, torch_s: float, native_s: float) -> None:
    print(
        f"{what:36} torch {torch_s * 1e6:10.1f} us {moved / torch_s / 1e9:6.1f} GB/s"
        f"   native {native_s * 1e6:10.1f} us {moved / native_s / 1e9:6.1f} GB/s   {torch_s / native_s:5.2f}x"
    )


def linears(native: CpuKernels, dtype: torch.dtype, rows: Sequence[int], repeats: int) -> None:
    """All products of a step. torch: packed by oneDNN in bf16, as tensor_parallel.py would have it; float32 product."""
    shapes = [(960, 576), (576, 576), (3072, 576), (576, 1536)] * LAYERS + [(VOCAB, HIDDEN)]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    moved = sum(weight.nbytes for weight in weights)
    packed = [torch.ops.mkldnn._reorder_linear_weight(w, 16) for w in weights] if dtype == torch.bfloat16 else []
    ours_packed = [native.pack(weight.clone()) for weight in weights]
    for count in rows:
        inputs = {width: torch.randn(count, width, dtype=dtype) for width in (576, 1536)}

        def plain() -> None:
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)

        def onednn() -> None:
            for weight, pack in zip(weights, packed, strict=True):
                torch.ops.mkldnn._linear_pointwise(inputs[weight.shape[1]], pack, None, "none", [], "")

        def ours() -> None:
            for weight in ours_packed:
                native.linear(inputs[weight.depth], weight)

        line(f"linears, {count} rows", moved, seconds(onednn if packed else plain, repeats), seconds(ours, repeats))


def elementwise(native: CpuKernels, dtype: torch.dtype, rows: Sequence[int], repeats: int) -> None:
    weight = torch.randn(HIDDEN, dtype=dtype)
    for count in rows:
        x, residual = (torch.randn(count, HIDDEN, dtype=dtype) for _ in range(2))
        gate_up = torch.randn(count, 2 * FFN, dtype=dtype)
        gate, up = gate_up.chunk(2, dim=-1)

        def add_norm() -> torch.Tensor:
            return F.rms_norm(x + residual, weight.shape, weight, 1e-5)

        tasks: list[tuple[str, int, Callable[[], object], Callable[[], object]]] = [
            (
                "rms_norm",
                2 * x.nbytes,
                lambda: F.rms_norm(x, weight.shape, weight, 1e-5),
                lambda: native.rms_norm(x, weight, 1e-5),
            ),
            ("add_rms_norm", 4 * x.nbytes, add_norm, lambda: native.add_rms_norm(x, residual, weight, 1e-5)),
            ("silu_and_mul", 3 * gate.nbytes, lambda: F.silu(gate) * up, lambda: native.silu_and_mul(gate_up)),
        ]
        for name, moved, theirs, ours in tasks:
            line(f"{name}, {count} rows", moved, seconds(theirs, repeats), seconds(ours, repeats))


def attention(dtype: torch.dtype, repeats: int) -> None:
    """(sequences, start, new tokens of each, tokens that all share); the caches of all layers in turn."""
    steps = [(1, 500, 1, 0), (16, 500, 1, 0), (16, 1100, 1, 0), (16, 1100, 1, 1024), (1, 4000, 1, 0)]
    for sequences, start, count, shared in [*steps, (1, 500, 5, 0), (1, 0, 128, 0), (1, 0, 1024, 0)]:
        blocks = -(-(start + count) // BLOCK_SIZE)
        shape = (LAYERS, sequences * blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        k_cache, v_cache = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        common = shared // BLOCK_SIZE
        plan = StepPlan(
            tuple(
                ScheduledSequence(
                    i, start, (0,) * count, (*range(common), *range(i * blocks + common, (i + 1) * blocks))
                )
                for i in range(sequences)
            )
        )
        total = sequences * count
        qkv = torch.randn(total, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=dtype)
        tables = (torch.randn(start + count, HEAD_DIM) for _ in range(2))
        rotation = Rotation(*tables, torch.arange(start, start + count).repeat(sequences))
        layer, caches = (
            AttentionLayer(HEAD_DIM**-0.5),
            [LayerCache(*parts) for parts in zip(k_cache, v_cache, strict=True)],
        )
        times = []
        batch = StepBuffers(StepLimits(sequences, total, blocks * BLOCK_SIZE, BLOCK_SIZE), CPU).fill(plan)
        for implementation in (ReferenceAttention(BLOCK_SIZE, CPU), NativeCpuAttention()):
            implementation.prepare(batch)

            def layers() -> None:
                for cache in caches:
                    implementation.forward(qkv, rotation, cache, batch, layer)

            times.append(seconds(layers, repeats))
        name = f"attention, {sequences} x ({start} + {count})" + (f", {shared} shared" if shared else "")
        read = (sequences * blocks - (sequences - 1) * common) / (sequences * blocks)
        line(f"{name}, {LAYERS} layers", read * k_cache.nbytes * 2, *times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64")
    parser.add_argument("--only", default="linears,elementwise,attention")
    options = parser.parse_args()
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if not (native := kernels_of(dtype)):
        raise SystemExit("the kernels can't be built here; the warning above says why")
    rows = [int(count) for count in options.rows.split(",")]
    if "linears" in options.only:
        linears(native, dtype, rows, options.repeats)
    if "elementwise" in options.only:
        elementwise(native, dtype, rows, options.repeats * 10)
    if "attention" in options.only:
        attention(dtype, options.repeats)


if __name__ == "__main__":
    main()
