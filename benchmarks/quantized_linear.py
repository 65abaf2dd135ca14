"""Products by weights in 8 and 4 bits beside bfloat16, ours and torch's. `python -m benchmarks.quantized_linear`.

All products of a model's layers in turn, so that each weight comes from memory as in a step; the formats take turns
within each repetition, and the fastest of each counts. Needs an idle machine; on a shared one, --threads 1 counts the
processor's time instead of the clock's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from tidewright.devices.cpu.huge_pages import huge_empty
from tidewright.devices.cpu.kernels import kernels_of
from tidewright.devices.cpu.quantized import PackedQuantizedWeight, quantized_kernels_of
from tidewright.quantization.affine import AffineWeight, Scheme, scheme_named

# Of a layer: outputs by inputs of query, key and value; output; gate and up; down. And how many layers are computed.
SHAPES = {
    "135m": ([(960, 576), (576, 576), (3072, 576), (576, 1536)], 30, (49152, 576)),
    "135m-layer": ([(960, 576), (576, 576), (3072, 576), (576, 1536)], 1, None),  # stays in the caches
    "1b": ([(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)], 3, None),
    "8b": ([(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)], 1, None),
}


def read_speed() -> float:
    """Bytes a second that all threads together read from memory."""
    memory = huge_empty(1 << 29).view(torch.float32).fill_(1)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - start)
    return memory.nbytes / min(times)


def random_weight(shape: tuple[int, int], scheme: Scheme) -> AffineWeight:
    features, depth = shape
    size = scheme.group_size or depth
    low, high = (-127, 128) if scheme.weight_bits == 8 else (0, 16) if not scheme.symmetric else (-8, 8)
    codes_FE = torch.randint(low, high, shape, dtype=torch.int8)
    scales_FG = torch.rand(features, -(-depth // size)) * 1e-3
    return AffineWeight(codes_FE, scales_FG, None if scheme.symmetric else -8 * scales_FG, scheme.weight_bits, size)


def products(name: str, model: str) -> tuple[Callable[[int], Callable[[], None]], int]:
    """Makes of a number of rows the work of all products; and the bytes of the weights."""
    layer, layers, head = SHAPES[model]
    shapes = layer * layers + ([head] if head else [])
    depths = {depth for _, depth in shapes}

    def work(multiply: list[Callable[[torch.Tensor], torch.Tensor]], rows: int) -> Callable[[], None]:
        inputs = {depth: torch.randn(rows, depth, dtype=torch.bfloat16) for depth in depths}

        def run() -> None:
            for (_, depth), product in zip(shapes, multiply, strict=True):
                product(inputs[depth])

        return run

    if name in ("torch", "bf16"):
        plain = [huge_empty(f * e * 2).view(torch.bfloat16).view(f, e).normal_() for f, e in shapes]
        size = sum(weight.nbytes for weight in plain)
        if name == "torch":
            return partial(work, [partial(_torch, weight) for weight in plain]), size
        kernels = kernels_of(torch.bfloat16)
        assert kernels
        packed = [kernels.pack(weight) for weight in plain]
        return partial(work, [partial(kernels.linear, weight=weight) for weight in packed]), size
    scheme, quantized = scheme_named(name), quantized_kernels_of(torch.bfloat16)
    assert quantized
    few = [PackedQuantizedWeight([random_weight(shape, scheme)], huge_empty) for shape in shapes]
    return partial(work, [partial(quantized.linear, weight=weight) for weight in few]), sum(w.nbytes for w in few)


def _torch(weight_FE: torch.Tensor, x_TE: torch.Tensor) -> torch.Tensor:
    return F.linear(x_TE, weight_FE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    parser.add_argument("--formats", nargs="+", default=["torch", "bf16", "int8", "int4-g32", "int4-g64"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    print(f"{torch.get_num_threads()} threads; memory is read at {read_speed() / 1e9:.1f} GB/s")
    with torch.inference_mode():
        for model in options.models:
            made = {name: products(name, model) for name in options.formats}
            layer, layers, head = SHAPES[model]
            values = sum(f * e for f, e in layer * layers + ([head] if head else []))
            for rows in options.rows:
                runs = {name: work(rows) for name, (work, _) in made.items()}
                times = dict.fromkeys(runs, float("inf"))
                for _ in range(options.repeats):
                    for name, run in runs.items():
                        start = clock()
                        run()
                        times[name] = min(times[name], clock() - start)
                for name, seconds in times.items():
                    print(
                        f"{model:10} {rows:4} rows  {name:9} {seconds * 1e3:9.2f} ms "
                        f"{made[name][1] / seconds / 1e9:6.1f} GB/s {2 * rows * values / seconds / 1e9:7.0f} Gop/s"
                        + (f"  {times['bf16'] / seconds:5.2f}x bf16" if "bf16" in times else ""),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
