"""What a decode step costs outside the model, on one core. `python -m benchmarks.step_overhead`.

The scheduler, the model runner's bookkeeping and the sampler are the real ones; a no-op with fixed hidden states and
logits replaces the model. Times are processor time of the one thread, so that other processes disturb them little.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tidewright.engine.engine import make_scheduler
from tidewright.engine.messages import EngineConfig
from tidewright.engine.model_runner import ModelRunner
from tidewright.engine.scheduler import Scheduler
from tidewright.engine.sequence import Sequence
from tidewright.schema import SamplingParams

SIZES = (1, 16, 64, 256)
PARTS = ("plan", "batch", "sample", "commit")
LOADS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
}


@dataclass
class NoModel:
    """Answers with the first rows of fixed tensors, and notes when it was called."""

    hidden: torch.Tensor
    all_logits: torch.Tensor
    called: float = 0.0
    returned: float = 0.0

    def __call__(self, *_: object) -> torch.Tensor:
        self.called = self.returned = time.thread_time()
        return self.hidden

    def logits(self, hidden_BE: torch.Tensor) -> torch.Tensor:
        return self.all_logits[: len(hidden_BE)]


@dataclass
class Times:
    """Seconds of each part, step by step."""

    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def medians_ms(self) -> dict[str, float]:
        medians = {part: 1e3 * statistics.median(values) for part, values in self.parts.items()}
        steps = zip(*self.parts.values(), strict=True)
        return medians | {"all": 1e3 * statistics.median(map(sum, steps))}


def make_runner(folder: Path, running: int, context: int, vocab_size: int) -> ModelRunner:
    """Over a tiny random model: only the sizes that cost bookkeeping are those of a real one."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=2 * context,
        eos_token_id=2,
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return ModelRunner(engine_config(folder, running, context))


def engine_config(folder: Path, running: int, context: int) -> EngineConfig:
    return EngineConfig(
        model_dir=str(folder),
        device="cpu",
        dtype="float32",
        threads=1,
        max_running=running,
        max_waiting=running,
        max_model_len=2 * context,
        kv_cache_memory=f"{2 * 16 * 4 * 2 * context * running}B",  # keys and values of 16 numbers
    )


def measure(running: int, context: int, load: str, vocab_size: int, steps: int, shared: int) -> Times:
    with tempfile.TemporaryDirectory() as name:
        runner = make_runner(Path(name), running, context, vocab_size)
        scheduler = make_scheduler(engine_config(Path(name), running, context), runner)
    generator = torch.Generator().manual_seed(0)
    logits_BV = 3 * torch.randn(running, vocab_size, generator=generator)
    model = NoModel(torch.zeros(4096, 16), logits_BV)
    runner.device.forward = model  # type: ignore[method-assign, assignment]
    runner.model = model  # type: ignore[assignment]
    submit(scheduler, running, context, load, vocab_size, shared)
    times = Times()
    while len(times.parts["plan"]) < steps:
        began = time.thread_time()
        plan = scheduler.schedule()
        planned = time.thread_time()
        result = runner.launch(plan).result()
        computed = time.thread_time()
        scheduler.commit(plan, result)
        ended = time.thread_time()
        if [sequence.count for sequence in plan.sequences] == [1] * running:  # else prompts are still read
            spent = planned - began, model.called - planned, computed - model.returned, ended - computed
            for part, seconds in zip(PARTS, spent, strict=True):
                times.parts[part].append(seconds)
    return times


def submit(scheduler: Scheduler, running: int, context: int, load: str, vocab_size: int, shared: int) -> None:
    rng = random.Random(0)
    beginning = rng.choices(range(3, vocab_size), k=shared)
    for request_id in range(running):
        prompt = [*beginning, *rng.choices(range(3, vocab_size), k=context - shared)]
        params = SamplingParams(**LOADS[load], seed=request_id, max_tokens=2 * context, ignore_eos=True)
        scheduler.add(Sequence(request_id, prompt, params))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=SIZES, help="sequences in a step")
    parser.add_argument("--loads", nargs="+", default=[*LOADS], choices=[*LOADS], help="sampling parameters")
    parser.add_argument("--context", type=int, default=2000, help="tokens of each sequence before the first step")
    parser.add_argument("--shared", type=int, default=0, help="of these, tokens that all sequences begin with")
    parser.add_argument("--vocab", type=int, default=49152, help="small: what is left is bookkeeping")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"context {options.context} ({options.shared} shared), vocabulary {options.vocab}, medians, ms")
    print(f"{'load':10} {'running':>8} " + " ".join(f"{part:>8}" for part in (*PARTS, "all")), flush=True)
    for load in options.loads:
        for running in options.running:
            times = measure(running, options.context, load, options.vocab, options.steps, options.shared)
            figures = " ".join(f"{value:8.3f}" for value in times.medians_ms().values())
            print(f"{load:10} {running:8} {figures}", flush=True)


if __name__ == "__main__":
    main()
