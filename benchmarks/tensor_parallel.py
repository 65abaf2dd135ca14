"""Tensor parallelism: 2 (or more) ranks of one core each beside 1 rank. `python -m benchmarks.tensor_parallel`.

The engine alone, without Triton; the sizes take turns within each repetition. A model of random weights is made once,
in the cache folder. Printed are medians, the speedup over one rank, and the efficiency: speedup by number of ranks.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from tidewright.bench.machine import wait_idle
from tidewright.bench.targets import EngineTarget
from tidewright.bench.workloads import Request, Run, token_ids
from tidewright.cache import EMBEDDED_MODEL, cache_dir
from tidewright.config import Settings
from tidewright.launch.prepare import prepare

# Llama 3.2 1B, and the same with fewer and narrower layers.
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "layers": 16, "heads": 32, "vocab": 128256},
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "layers": 4, "heads": 16, "vocab": 4096},
}
KV_HEADS, HEAD_DIM = 8, 64


def random_model(name: str) -> Path:
    """A Llama of that shape in bf16, with the embedded model's tokenizer, which the benchmark does not use."""
    folder = cache_dir() / "benchmarks" / f"random-{name}"
    if (folder / "config.json").is_file():
        return folder
    print(f"Making a model of random weights: {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[name]
    vocab, hidden, ffn, heads = (shape[part] for part in ("vocab", "hidden_size", "intermediate_size", "heads"))
    torch.manual_seed(0)
    weights = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(shape["layers"]):
        weights |= {
            f"model.layers.{layer}.{part}.weight": size
            for part, size in {
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (heads * HEAD_DIM, hidden),
                "self_attn.k_proj": (KV_HEADS * HEAD_DIM, hidden),
                "self_attn.v_proj": (KV_HEADS * HEAD_DIM, hidden),
                "self_attn.o_proj": (hidden, heads * HEAD_DIM),
                "mlp.gate_proj": (ffn, hidden),
                "mlp.up_proj": (ffn, hidden),
                "mlp.down_proj": (hidden, ffn),
            }.items()
        }
    tensors = {
        part: torch.ones(size, dtype=torch.bfloat16) if len(size) == 1 else (torch.randn(size) * 0.02).bfloat16()
        for part, size in weights.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_bytes((prepare(EMBEDDED_MODEL) / "tokenizer.json").read_bytes())
    config = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": heads,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Ranks:
    """An engine of so many ranks, and what was measured of it."""

    def __init__(self, size: int, folder: Path, options: argparse.Namespace) -> None:
        self.size = size
        settings = Settings(
            tensor_parallel_size=size, threads=1, kv_cache_memory="512MiB", prefix_caching=False, start_timeout=600,
            heartbeat_timeout=300, dtype=options.dtype,
        )  # fmt: skip
        self.engine = EngineTarget(settings, folder)
        self.prefill: list[float] = []  # seconds of a prompt
        self.decode: list[float] = []  # tokens a second
        self.agree: list[float] = []  # ms a step
        ready = self.engine.ready
        assert ready
        self.load = ready.load_seconds
        processes = [psutil.Process(ready.pid), *psutil.Process(ready.pid).children()]
        self.memory = [process.memory_full_info().uss / 2**20 for process in processes]

    def measure(self, rng: random.Random, ids: range, options: argparse.Namespace) -> None:
        wait_idle()
        run = self._run([Request(rng.choices(ids, k=options.prompt), 1)])
        self.prefill.append(run.seconds)
        before = self.engine.stats()
        run = self._run([Request(rng.choices(ids, k=8), options.tokens) for _ in range(options.batch)])
        after = self.engine.stats()
        all_read = max(outcome.first for outcome in run.outcomes)
        self.decode.append(sum(outcome.tokens - 1 for outcome in run.outcomes) / (run.seconds - all_read))
        self.agree.append(1e3 * (after.agree_seconds - before.agree_seconds) / (after.steps - before.steps))

    def _run(self, requests: list[Request]) -> Run:
        return Run.of(requests, self.engine.run(requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b", help="1b or tiny (random weights), or a model folder or name")
    parser.add_argument("--sizes", default="1,2", help="numbers of ranks, the first of them the baseline")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--batch", type=int, default=16, help="sequences decoded at once")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each of them")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    folder = random_model(options.model) if options.model in SHAPES else prepare(options.model)
    rng, ids = random.Random(0), token_ids(folder)
    sizes: list[Ranks] = []
    try:
        for size in map(int, options.sizes.split(",")):
            print(f"Starting {size} rank(s)", flush=True)
            sizes.append(Ranks(size, folder, options))
        for repetition in range(-1, options.repetitions):
            print(f"Repetition {repetition + 1} of {options.repetitions}", flush=True)
            for ranks in sizes:
                ranks.measure(rng, ids, options)
    finally:
        for ranks in sizes:
            ranks.engine.close()
    base = sizes[0]
    print(f"{options.model}, {options.dtype}, one thread a rank; medians of {options.repetitions} after a warm-up")
    for ranks in sizes:
        prefill, decode = statistics.median(ranks.prefill[1:]), statistics.median(ranks.decode[1:])
        faster = (statistics.median(base.prefill[1:]) / prefill, decode / statistics.median(base.decode[1:]))
        share = [f"{100 * base.size * ratio / ranks.size:.0f} %" for ratio in faster]
        print(
            f"{ranks.size} rank(s): prefill of {options.prompt} {prefill:.2f} s ({faster[0]:.2f}x, {share[0]})"
            f"   decode of {options.batch} {decode:.1f} tokens/s ({faster[1]:.2f}x, {share[1]})"
            f"   agreement {statistics.median(ranks.agree[1:]):.2f} ms a step   load {ranks.load:.2f} s"
            f"   memory of each rank {', '.join(f'{mib:.0f}' for mib in ranks.memory)} MiB"
        )


if __name__ == "__main__":
    main()
