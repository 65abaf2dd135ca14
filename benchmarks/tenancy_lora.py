"""LoRA adapters in one batch beside the base model: `python -m benchmarks.tenancy_lora`; wants an idle machine.

One engine in this process. In each round the same requests run without adapters and with `--adapters` of them, spread
over the sequences, in turns. Printed: tokens/s of decoding and of prompts and the median of the rounds' ratios; then
how long a load takes beside running streams, from the request to the first step that can have it, and the longest step
meanwhile beside the median and the longest of as many steps without a load.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

from tidewright.config import Settings
from tidewright.distributed.rank_messages import AdapterRead
from tidewright.engine.adapter_host import AdapterHost
from tidewright.engine.engine import Engine
from tidewright.engine.messages import Submit
from tidewright.launch.prepare import prepare
from tidewright.models.families import read_config
from tidewright.models.folder import read_json
from tidewright.schema import SamplingParams

TARGET, TARGET_LOAD = 0.8, 0.2  # of the base model's throughput; seconds
PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def write_adapter(folder: Path, model: Path, rank: int, seed: int) -> None:
    """Of all projections, with small random numbers."""
    config, generator = read_config(read_json(model / "config.json")), torch.Generator().manual_seed(seed)
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_heads * size, config.num_kv_heads * size
    outputs = {"q": heads, "k": kv_heads, "v": kv_heads, "o": hidden, "gate": inner, "up": inner, "down": hidden}
    inputs = {"o": heads, "down": inner}
    tensors = {}
    for layer in range(config.num_layers):
        for part, names in PROJECTIONS.items():
            for name in names:
                key, short = f"base_model.model.model.layers.{layer}.{part}.{name}", name.removesuffix("_proj")
                for half, shape in (
                    ("lora_A", (rank, inputs.get(short, hidden))),
                    ("lora_B", (outputs[short], rank)),
                ):
                    tensors[f"{key}.{half}.weight"] = 0.02 * torch.randn(shape, generator=generator)
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    names = [name for group in PROJECTIONS.values() for name in group]
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


class Load:
    """Requests of one length, all at once, with adapters or without."""

    def __init__(self, engine: Engine, sequences: int, prompt: int, output: int) -> None:
        self.engine, self.sequences, self.prompt, self.output = engine, sequences, prompt, output
        self._next_id = 0

    def submit(self, adapters: list[str], output: int = 0) -> None:
        params = SamplingParams(max_tokens=output or self.output, ignore_eos=True, temperature=0, seed=0)
        for number in range(self.sequences):
            ids = [5 + (self._next_id * 7919 + place * 31) % 40_000 for place in range(self.prompt)]
            adapter = adapters[number % len(adapters)] if adapters else ""
            assert self.engine.submit(Submit(self._next_id, ids, params, adapter=adapter)) is None
            self._next_id += 1

    def run(self, adapters: list[str]) -> tuple[float, float]:
        """Tokens/s of prompts, and of decoding once all prompts are computed."""
        self.submit(adapters)
        began, first, tokens, waiting = time.perf_counter(), 0.0, 0, self.sequences
        while self.engine.has_work:
            for output in self.engine.step():
                if output.times and output.times.first_token:
                    waiting -= 1
                elif not waiting:
                    tokens += len(output.token_ids)
            if not waiting and not first:
                first = time.perf_counter()
        prefill = self.sequences * self.prompt / (first - began)
        return prefill, tokens / (time.perf_counter() - first)


def steps(engine: Engine, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        engine.step()
        taken.append(time.perf_counter() - began)
    return taken


def load_beside_streams(engine: Engine, load: Load, number: int, path: str) -> tuple[float, float, list[float]]:
    """Seconds until it is loaded, the longest step meanwhile, and as many steps without a load."""
    read: queue.SimpleQueue[AdapterRead] = queue.SimpleQueue()
    host = AdapterHost(engine, None, read.put, print)
    load.submit([], output=200)
    steps(engine, 30)
    before = steps(engine, 30)
    began, taken = time.perf_counter(), []
    host.read_adapter(number, path)
    while read.empty():
        taken += steps(engine, 1)
    host.add_adapter(path, number)
    loaded = time.perf_counter() - began
    taken += steps(engine, 5)
    while engine.has_work:
        engine.step()
    host.drop_adapter(path)
    return loaded, max(taken), before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Settings().model)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sequences", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--output", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    model = prepare(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = [f"adapter{number}" for number in range(options.adapters)]
        for number, name in enumerate(names):
            write_adapter(folder / name, model, options.rank, number)
        settings = Settings(
            adapter_folder=scratch,
            max_adapters=max(options.adapters, 1),
            max_lora_rank=options.rank,
            quantization=options.quantization,
            threads=options.threads,
            kv_cache_memory="512MiB",
            prefix_caching=False,
        )
        engine = Engine(settings.engine_config(model))
        for name in names:
            engine.add_adapter(name, engine.runner.read_adapter(name))
        for sequences in options.sequences:
            load = Load(engine, sequences, options.prompt, options.output)
            found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
            for number in range(options.rounds + 1):
                for adapted in (False, True) if number % 2 else (True, False):
                    speed = load.run(names if adapted else [])
                    if number:
                        found[adapted].append(speed)
            for place, what in enumerate(("prompts", "decoding")):
                base, adapted_speed = ([pair[place] for pair in found[key]] for key in (False, True))
                ratio = statistics.median(b / a for a, b in zip(base, adapted_speed, strict=True))
                speeds = [statistics.median(found_speeds) for found_speeds in (base, adapted_speed)]
                label = f"{sequences} sequences, {what:8}: base {speeds[0]:8.1f} tokens/s, {options.adapters} adapters"
                goal = f" (goal {TARGET})" if what == "decoding" else ""
                print(f"{label} of rank {options.rank} {speeds[1]:8.1f}: {ratio:.2f}{goal}")
        load = Load(engine, 16, options.prompt, options.output)
        engine.drop_adapter(names[0])
        loads = [load_beside_streams(engine, load, number, names[0]) for number in range(options.loads)]
        usual = [one for _, _, before in loads for one in before]
        milliseconds = [1000 * loaded for loaded, _, _ in loads]
        print(
            f"load beside 16 streams: median {statistics.median(milliseconds):.0f} ms, longest {max(milliseconds):.0f} "
            f"(goal {1000 * TARGET_LOAD:.0f}); longest step meanwhile {1000 * max(one for _, one, _ in loads):.0f} ms; "
            f"without a load: median {1000 * statistics.median(usual):.0f}, longest {1000 * max(usual):.0f}"
        )


if __name__ == "__main__":
    main()
