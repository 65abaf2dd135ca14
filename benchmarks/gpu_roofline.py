"""An estimate of decode on an H200, kernel by kernel, from shapes alone: `python -m benchmarks.gpu_roofline`.

It needs no GPU and measures nothing. devices/cuda/traffic.py counts the bytes and operations of each kernel; the speeds
are those that large copies and matrix products reach on the card. A real step takes longer: kernels reach only a part
of these speeds, and launches and the host cost time as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tidewright.devices.cuda.traffic import Traffic, decode_step, step_seconds
from tidewright.models.families import read_config
from tidewright.planning.gpus import GPUS
from tidewright.planning.weight_formats import SCHEMES

H200 = replace(GPUS["H200"], bandwidth=4.3e12, flops_16=790e12, source="copies 4.3 TB/s, bf16 products 790 TFLOP/s")
BATCHES = (1, 16, 64, 256)


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, is_tied: bool
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": is_tied,
    }


SHAPES = {
    "135M": _llama(576, 1536, 30, 9, 3, 49152, is_tied=True),  # SmolLM2 135M
    "1B": _llama(2048, 8192, 16, 32, 8, 128256, is_tied=True),  # Llama 3.2 1B
    "8B": _llama(4096, 14336, 32, 32, 8, 128256, is_tied=False),  # Llama 3.1 8B
}
"""As in config.json."""
FORMATS = {"bf16": None, **{name: SCHEMES[name] for name in ("int8", "int4-g64")}}
MODELS = {name: read_config(SHAPES[name]) for name in ("1B", "8B")}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2000, help="tokens of each sequence (default: 2000)")
    parser.add_argument("--filters", type=int, choices=(0, 1, 2), default=0, help="1: top_k or top_p, 2: both")
    parser.add_argument("--kernels", action="store_true", help="also what each kernel takes at batch 64")
    options = parser.parse_args(arguments)
    print(f"An estimate, not a measurement: decode in bf16 on one H200 ({H200.source}),")
    print(f"contexts of {options.context} tokens. Each byte moves once; launches and the host are not counted.\n")
    columns = "".join(f"{name:>12}" for name in ("weights", "KV cache", "others", "step"))
    print(f"{'model':6}{'weights':9}{'batch':>6}{columns}{'tokens/s':>10}{'of one':>9}  bound by")
    for name, model in MODELS.items():
        for weights, form in FORMATS.items():
            for batch in BATCHES:
                step = decode_step(model, batch, options.context, searches=options.filters, weights=form)
                print(_row(name, weights, batch, step))
    if options.kernels:
        for name, model in MODELS.items():
            print(f"\n{name}, batch 64: ms, share of the step, GB")
            _print_kernels(decode_step(model, 64, options.context, searches=options.filters))


def _row(name: str, weights_name: str, batch: int, step: Sequence[Traffic]) -> str:
    seconds = step_seconds(step, H200)
    weights, cache, others = (
        sum(getattr(kernel, kind) * kernel.times for kernel in step) for kind in ("weights", "cache", "activations")
    )
    sizes = "".join(f"{size / 1e9:9.3f} GB" for size in (weights, cache, others))
    by_arithmetic = sum(k.seconds(H200, "bfloat16") for k in step if k.is_bound_by_arithmetic(H200, "bfloat16"))
    bound = f"memory {1 - by_arithmetic / seconds:.0%}, arithmetic {by_arithmetic / seconds:.0%}"
    speeds = f"{1e3 * seconds:9.3f} ms{batch / seconds:10.0f}{1 / seconds:9.0f}"
    return f"{name:6}{weights_name:9}{batch:6}{sizes}{speeds}  {bound}"


def _print_kernels(step: Sequence[Traffic]) -> None:
    total = step_seconds(step, H200)
    for kernel in sorted(step, key=lambda kernel: -kernel.seconds(H200, "bfloat16")):
        seconds = kernel.seconds(H200, "bfloat16")
        times = f"{kernel.kernel} x {kernel.times}" if kernel.times > 1 else kernel.kernel
        print(f"  {times:28}{1e3 * seconds:8.3f}{seconds / total:8.1%}{kernel.bytes * kernel.times / 1e9:9.3f}")


if __name__ == "__main__":
    main()
