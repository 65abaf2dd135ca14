"""Small random checkpoints from transformers, and our model runner driven by hand over them.

No scheduler here: blocks are dealt out in a random order and prompts are cut into chunks, whatever the engine would do.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch
import transformers

from tidewright.engine.messages import EngineConfig
from tidewright.engine.model_runner import ModelRunner
from tidewright.engine.plan import Draw, ScheduledSequence, StepPlan
from tidewright.schema import SamplingParams

VOCAB = 131
BLOCK_SIZE = 4
# Several KV heads but fewer than heads, and nothing round.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def save(
    folder: Path, config: transformers.PreTrainedConfig, shards: bool = False, dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    # A copy: saving writes the type into the configuration, and a model made from it then rounds some constants to it.
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # norms and biases start as ones and zeros, which would hide a mistake
                weight.add_(0.3 * torch.randn_like(weight))
        # Large embeddings make a model with a tied head repeat its last token for ever.
        model.get_input_embeddings().weight.mul_(0.15)
    model.to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
    return model


def engine_config(folder: Path, **changes: Any) -> EngineConfig:
    values = {"dtype": "float32", "block_size": BLOCK_SIZE, "kv_cache_memory": "4MiB", "max_batched_tokens": 64}
    return EngineConfig(model_dir=str(folder), **(values | changes))


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(model: transformers.PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """transformers' greedy tokens, from a full forward for each (no cache that could be wrong in the same way)."""
    ids, length = list(ids), len(ids)
    with torch.inference_mode():
        while len(ids) < length + count:
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[length:]


def logits(runner: ModelRunner, ids: list[int], chunk: int, adapter: int = -1) -> torch.Tensor:
    """logits_TV of one prompt, `chunk` tokens a step, with the LoRA adapter in that slot."""
    table = tuple(_blocks(runner, len(ids)))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(ids), chunk):
            span = ScheduledSequence(0, start, tuple(ids[start : start + chunk]), table, adapter=adapter)
            batch = runner._buffers.fill(StepPlan((span,)))
            parts.append(runner.model.logits(runner.device.forward(runner.model, batch, runner.kv_cache)))
    return torch.cat(parts)


def greedy(runner: ModelRunner, prompts: list[list[int]], count: int, chunk: int) -> list[list[int]]:
    """All sequences at once, `chunk` tokens of each a step: long prompts are read while short ones are answered."""
    tokens, computed = [list(ids) for ids in prompts], [0] * len(prompts)
    blocks = _blocks(runner, sum(len(ids) + count + BLOCK_SIZE for ids in prompts))
    tables = [tuple(blocks.pop() for _ in range(-(-(len(ids) + count) // BLOCK_SIZE))) for ids in prompts]
    params = SamplingParams(temperature=0)
    while running := [i for i, ids in enumerate(tokens) if len(ids) < len(prompts[i]) + count]:
        sequences = []
        for i in running:
            new = tuple(tokens[i][computed[i] : computed[i] + chunk])
            ends = computed[i] + len(new) == len(tokens[i])
            draws = (Draw(i, params, len(tokens[i])),) if ends else ()
            sequences.append(ScheduledSequence(i, computed[i], new, tables[i], draws))
        result = runner.launch(StepPlan(tuple(sequences))).result()
        for planned, output in zip(sequences, result.sequences, strict=True):
            computed[planned.request_id] += planned.count
            tokens[planned.request_id] += [drawn.token_id for drawn in output.drawn]
    return [ids[len(start) :] for ids, start in zip(tokens, prompts, strict=True)]


def _blocks(runner: ModelRunner, tokens: int) -> list[int]:
    return random.Random(0).sample(range(runner.kv_cache.num_blocks), -(-tokens // BLOCK_SIZE))
