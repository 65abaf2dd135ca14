"""Runs a plan on the device: loads the model and its KV cache once, then a forward and a sampling each step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tidewright.devices.cpu.step_threads import set_threads
from tidewright.devices.registry import dtype_of, make_device
from tidewright.distributed.group import ALONE, TensorParallelGroup
from tidewright.engine.messages import EngineConfig, TokenLogprob
from tidewright.engine.plan import DrawnToken, ScheduledSequence, StepPlan, StepResult
from tidewright.engine.pooling import Pooler
from tidewright.engine.runner import USEFUL_TOKENS, EngineConfigError
from tidewright.kv_cache.storage import KVCacheShape, allocate_kv_cache, count_blocks
from tidewright.layers.loading import load_weights
from tidewright.models.families import read_config
from tidewright.models.folder import eos_ids, read_json
from tidewright.models.registry import model_class
from tidewright.sampling.guided import GuidedDecoding
from tidewright.sampling.sampler import prompt_logprobs, sample
from tidewright.sampling.token_counts import TokenCounts
from tidewright.step.batch import StepBatch
from tidewright.step.buffers import StepBuffers, StepLimits

# Logits of a long prompt would take gigabytes at once.
_LOGPROB_ROWS = 128


class ModelRunner:
    """One rank's part of the model. Only rank 0 draws tokens; the results of the others are empty.

    Raises EngineConfigError, DeviceError, ModelConfigError, ShardingError, CheckpointError or KVCacheMemoryError.
    """

    def __init__(self, config: EngineConfig, group: TensorParallelGroup = ALONE) -> None:
        set_threads(config.threads, config.local_ranks)
        folder = Path(config.model_dir)
        self.dtype = dtype_of(config.dtype)
        model_json = read_json(folder / "config.json")
        architecture = model_class(model_json)
        model_config = read_config(model_json)
        device = config.device, config.attention, config.block_size
        self.device = make_device(*device, self.dtype, model_config.head_dim, adapt_threads=config.threads == 0)
        limit = model_config.max_positions
        if config.max_model_len > limit:
            raise EngineConfigError(f"max_model_len is {config.max_model_len}, but the model's limit is {limit}")
        wanted = config.max_model_len or limit

        self.vocab_size = model_config.vocab_size
        self.eos_ids = eos_ids(folder)
        self.guided = GuidedDecoding(folder / "tokenizer.json", self.vocab_size, self.eos_ids)
        self._counts = TokenCounts()
        with _defaults(self.device.torch_device, self.dtype):
            self.model = architecture(model_config, wanted, group, self.device).eval()
            if config.task == "embed":  # checkpoints of embedding models may lack the head
                self.model.remove_head()
        self.embedding_size, self._pooler = 0, None
        if config.task == "embed":
            self.embedding_size = model_config.hidden_size
            self._pooler = Pooler(config.pooling, config.normalize, self.model.norm)
        self.device.memory.place_weights(self.model)
        load_weights(folder, self.model.loaders(), self.model.ignored_weights())
        self.device.finish(self.model)
        shape = KVCacheShape(
            model_config.num_layers,
            self.model.num_kv_heads,
            model_config.head_dim,
            config.block_size,
            self.dtype,
        )
        # Who sets a length gets that length; the model's own limit gives way to the memory.
        needed = config.max_model_len or min(limit, USEFUL_TOKENS)
        # The block tables are the same on all ranks, so the pool is as large as the smallest rank's.
        num_blocks = group.smallest(count_blocks(shape, config.kv_cache_memory, needed, self.device.memory))
        self.kv_cache = allocate_kv_cache(shape, num_blocks, self.device.memory)
        self.sample_seconds = 0.0  # logits and sampling, of all steps
        self.max_model_len = min(wanted, self.kv_cache.num_blocks * config.block_size)
        limits = StepLimits(config.max_running, config.max_batched_tokens, self.max_model_len, config.block_size)
        self._buffers = StepBuffers(limits, self.device.torch_device)

    @property
    def device_name(self) -> str:
        return str(self.device)

    @property
    def num_blocks(self) -> int:
        return self.kv_cache.num_blocks

    @property
    def progress(self) -> int:
        return self.model.layers_computed

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        self.guided.forget(plan.ended)
        self._counts.forget(plan.ended)
        batch = self._buffers.fill(plan)
        with self.device.step(self.kv_cache, self._buffers.highest_block):
            hidden_TE = self.device.forward(self.model, batch, self.kv_cache)
            began = time.monotonic()
            result = self._result(plan, batch, hidden_TE)
            self.sample_seconds += time.monotonic() - began
        return result

    def _result(self, plan: StepPlan, batch: StepBatch, hidden_TE: torch.Tensor) -> StepResult:
        prompt: dict[int, tuple[list[TokenLogprob], ...]] = {}
        for planned, end in zip(plan.sequences, batch.end_rows, strict=True):
            if planned.prompt_logprobs is not None:
                prompt[planned.request_id] = self._prompt_logprobs(planned, hidden_TE[end - planned.count : end])
        embeddings = self._pooler.embeddings(plan, batch.end_rows, hidden_TE) if self._pooler else None
        return StepResult.of(plan, self._sample(hidden_TE, batch), prompt, embeddings)

    def _prompt_logprobs(self, planned: ScheduledSequence, hidden_TE: torch.Tensor) -> tuple[list[TokenLogprob], ...]:
        entries: list[list[TokenLogprob]] = []
        ids = planned.next_prompt_ids
        for first in range(0, len(ids), _LOGPROB_ROWS):
            some = ids[first : first + _LOGPROB_ROWS]
            logits_BV = self.model.logits(hidden_TE[first : first + len(some)])
            if logits_BV is not None:
                entries += prompt_logprobs(logits_BV, some, planned.prompt_logprobs or 0)
        return tuple(entries)

    def _sample(self, hidden_TE: torch.Tensor, batch: StepBatch) -> list[DrawnToken]:
        if not len(batch.rows_R):
            return []
        logits_BV = self.model.logits(hidden_TE[batch.rows_R])
        return [] if logits_BV is None else sample(logits_BV, batch.sampling, self.guided, self._counts)


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New tensors are made on `device`, in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
