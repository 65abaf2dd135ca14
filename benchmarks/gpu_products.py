"""Products with quantized weights on a GPU beside torch's: `python -m benchmarks.gpu_products FILE [--dry-run]`.

All products of two layers of an 8B model, in turn and from a CUDA graph, so that each weight comes from memory and the
host costs nothing. Results are compared with those of the dequantized weights. FILE as gpu_parts.py has it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.gpu_parts import Report, copy_bandwidth
from tidewright.quantization.affine import AffineWeight, quantize_rtn, scheme_named

FORMATS = ("int8", "w8a8", "int4-g64", "int4-g128", "fp8")
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # outputs by inputs
ROWS = (1, 16, 32, 64, 256, 2048)
Product = Callable[[torch.Tensor], torch.Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, by the kernels' interpreter")
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported
    device, dtype = torch.device("cuda"), torch.bfloat16
    shapes, all_rows, layers, repeats = SHAPES, ROWS, 2, 20
    if options.dry_run:
        device, dtype, shapes, all_rows, layers, repeats = (
            torch.device("cpu"),
            torch.float16,
            ((48, 64),),
            (1, 40),
            1,
            1,
        )
    report = Report(options.file)
    bandwidth = copy_bandwidth(device, 2**20 if options.dry_run else 2**31, 20)
    report.add("bandwidth of a copy", bandwidth / 1e9, "GB/s")
    weights = [torch.randn(shape, dtype=dtype, device=device) * 0.02 for shape in shapes * layers]
    plain: dict[int, float] = {}
    with torch.inference_mode():
        for name in ("16 bits", *FORMATS):
            made = _products(name, weights, device)
            if made is None:
                report.add(f"{name}", "this GPU has no such product")
                continue
            products, size, errors = made
            for rows in all_rows:
                inputs = [torch.randn(rows, weight.shape[1], dtype=dtype, device=device) for weight in weights]
                seconds = _seconds(products, inputs, device, repeats)
                plain.setdefault(rows, seconds)
                label = f"{name}, {rows} rows"
                report.add(f"{label}: share of that bandwidth", 100 * size / seconds / bandwidth, "%")
                flops = 2 * rows * sum(weight.numel() for weight in weights)
                report.add(f"{label}: speed", flops / seconds / 1e12, "TFLOP/s")
                report.add(f"{label}: beside torch in 16 bits", plain[rows] / seconds, "x")
                if rows in (all_rows[0], all_rows[-1]):
                    report.add(f"{label}: largest error, of the largest value", 100 * errors(inputs[0]), "%")


def _products(
    name: str, weights: list[torch.Tensor], device: torch.device
) -> tuple[list[Product], int, Callable[[torch.Tensor], float]] | None:
    """Of all weights, their bytes, and how far the first product is from that of the dequantized weight."""
    if name == "16 bits":
        plain: list[Product] = [lambda x, w=weight: F.linear(x, w) for weight in weights]
        return plain, sum(weight.nbytes for weight in weights), lambda x: 0.0
    from tidewright.devices.cuda.float8_weight import multiplies_float8, pack_float8
    from tidewright.devices.cuda.quantized_weight import pack, quantize_tokens

    scheme = scheme_named(name)
    if scheme.is_float and not multiplies_float8(device):
        return None
    products: list[Product] = []
    size = 0
    first: AffineWeight | None = None
    for weight in weights:
        affine = quantize_rtn(weight, scheme)
        first = first or affine
        packed = pack_float8(affine, device) if scheme.is_float else pack(affine, device)
        size += packed.nbytes

        def product(x: torch.Tensor, packed=packed) -> torch.Tensor:
            out = x.new_empty((len(x), packed.features))
            if scheme.activation_bits:
                return packed.multiply_quantized(quantize_tokens(x), None, out)
            return packed.multiply(x, None, out)

        products.append(product)
    assert first

    def errors(x: torch.Tensor) -> float:
        wanted = x.float() @ first.dequantized().T
        return float((products[0](x).float() - wanted).abs().max() / wanted.abs().max())

    return products, size, errors


def _seconds(products: list[Product], inputs: list[torch.Tensor], device: torch.device, repeats: int) -> float:
    """Of all products once."""

    def run() -> None:
        for product, x in zip(products, inputs, strict=True):
            product(x)

    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    from tidewright.devices.cuda.graphs import CudaRecorder

    replay = CudaRecorder(device).record(run)
    replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    main()
