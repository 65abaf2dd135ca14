"""Runs a plan on the device: loads the model and its KV cache once, then a forward and a sampling each step."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tidewright.devices.base import DeviceError
from tidewright.devices.cpu.step_threads import set_threads
from tidewright.devices.memory import PATIENCE, DeviceMemory, out_of_memory
from tidewright.devices.registry import cache_dtype_of, dtype_of, make_device
from tidewright.distributed.group import ALONE, TensorParallelGroup
from tidewright.engine.largest_step import largest_step
from tidewright.engine.messages import EngineConfig, TokenLogprob
from tidewright.engine.plan import DrawnToken, ScheduledSequence, StepPlan, StepResult
from tidewright.engine.pool import pool_size
from tidewright.engine.pooling import Pooler
from tidewright.engine.runner import USEFUL_TOKENS, EngineConfigError, LaunchedStep
from tidewright.engine.warm_up import warm_up_plans
from tidewright.kv_cache.budget import mib, parse_memory
from tidewright.kv_cache.storage import KVCache, KVCacheShape
from tidewright.layers.linear_method import LinearMethod
from tidewright.layers.loading import load_weights
from tidewright.layers.weights import weight_bytes
from tidewright.lora.adapter import Adapter
from tidewright.lora.checkpoint import AdapterLimits
from tidewright.lora.model import LoraModel, make_lora_layers
from tidewright.memory.account import FixedMemory
from tidewright.models.config import DecoderConfig
from tidewright.models.families import read_config
from tidewright.models.folder import eos_ids, read_json
from tidewright.models.llama import LlamaForCausalLM
from tidewright.models.registry import model_class
from tidewright.planning import footprint
from tidewright.quantization.choice import choose
from tidewright.quantization.stored_scheme import stored_in
from tidewright.sampling.guided import GuidedDecoding
from tidewright.sampling.logprobs import prompt_logprobs
from tidewright.step.batch import StepBatch
from tidewright.step.buffers import StepBuffers, StepLimits
from tidewright.step.transfers import Download, Pending, upload

# Logits of a long prompt would take gigabytes at once.
_LOGPROB_ROWS = 128

_NO_TOKENS: Pending[list[DrawnToken]] = Pending((), lambda _: [])
_NO_EMBEDDINGS: Pending[dict[int, bytes]] = Pending((), lambda _: {})

log = logging.getLogger(__name__)


class ModelRunner:
    """One rank's part of the model. Only rank 0 draws tokens; the results of the others are empty.

    Raises EngineConfigError, DeviceError, ModelConfigError, ShardingError, QuantizationError, CheckpointError or
    KVCacheMemoryError.
    """

    def __init__(self, config: EngineConfig, group: TensorParallelGroup = ALONE) -> None:
        set_threads(config.threads, config.local_ranks)
        folder = Path(config.model_dir)
        self.dtype = dtype_of(config.dtype)
        cache_dtype = cache_dtype_of(config.kv_cache_dtype, self.dtype)
        model_json = read_json(folder / "config.json")
        architecture = model_class(model_json)
        model_config = read_config(model_json)
        device = config.device, config.attention, config.block_size
        adapts = config.threads == 0
        self.device = make_device(*device, self.dtype, model_config.head_dim, adapts, cache_dtype)
        hardware, stored = self.device.hardware(self.dtype), stored_in(folder, model_json)
        quantization = choose(config.quantization, config.quantize_head, hardware, stored)
        self.device.quantization = quantization
        log.info("quantization is %s", quantization.reason)
        limit = model_config.max_positions
        if config.max_model_len > limit:
            raise EngineConfigError(f"max_model_len is {config.max_model_len}, but the model's limit is {limit}")
        wanted = config.max_model_len or limit

        self.vocab_size = model_config.vocab_size
        self.eos_ids = eos_ids(folder)
        self.guided = GuidedDecoding(folder / "tokenizer.json", self.vocab_size, self.eos_ids)
        self._sampler = self.device.sampler(self.guided)
        ahead = {"auto": self.device.torch_device.type == "cuda", "on": True, "off": False}[config.async_scheduling]
        self.steps_in_flight = 2 if ahead else 1
        self._group = group
        self.adapter_slots = adapter_slots = config.max_adapters if config.adapter_folder else 0

        def make_model(place: torch.device) -> LlamaForCausalLM:
            with _defaults(place, self.dtype):
                model = architecture(model_config, wanted, group, self.device).eval()
                if config.task == "embed":  # checkpoints of embedding models may lack the head
                    model.remove_head()
                if adapter_slots:
                    make_lora_layers(model, self.device, adapter_slots, config.max_lora_rank)
            return model

        if self.device.memory.is_bounded:
            _check_fits(make_model(torch.device("meta")), self.device.memory)
        self.model = make_model(self.device.torch_device)
        name = "" if group.rank or folder.suffix == ".gguf" else folder.name  # the file's says little
        most = parse_memory(config.adapter_memory, 0)
        allowed = AdapterLimits(Path(config.adapter_folder), config.max_lora_rank, self.dtype, name, most)
        self._lora = LoraModel(self.model.projections(), allowed, self.device.adapter_memory)
        self.embedding_size, self._pooler = 0, None
        if config.task == "embed":
            self.embedding_size = model_config.hidden_size
            self._pooler = Pooler(config.pooling, config.normalize, self.model.norm)
        self.device.memory.place_weights(self.model)
        load_weights(folder, self.model.loaders(), self.model.ignored_weights(), not quantization.is_stored)
        self.device.finish(self.model)
        shape = KVCacheShape(
            model_config.num_layers,
            self.model.num_kv_heads,
            model_config.head_dim,
            config.block_size,
            cache_dtype,
        )
        # Who sets a length gets that length; the model's own limit gives way to the memory.
        needed = config.max_model_len or min(limit, USEFUL_TOKENS)
        limits = StepLimits(config.max_running, config.max_batched_tokens, wanted, config.block_size, adapter_slots)
        memory, step_bytes = self.device.memory, self._measure_largest_step(config, shape, limits)
        weights, workspace = weight_bytes(self.model), step_bytes or _workspace(model_config, config, self.dtype)
        size = pool_size(config, shape, needed, memory, weights, workspace, step_bytes, group)
        bounds = size.most_blocks, size.room_blocks
        self.fixed_memory = FixedMemory(size.budget, weights, workspace, shape.bytes_per_block, *bounds)
        self.kv_cache = KVCache(shape, size.num_blocks, memory, size.room_blocks)
        self.forward_seconds = self.sample_seconds = 0.0
        first = config.first_max_model_len or wanted
        self.max_model_len = min(wanted, first, self.kv_cache.num_blocks * config.block_size)
        limits = replace(limits, max_model_len=self.max_model_len)
        self._first_blocks = tuple(range(-(-self.max_model_len // config.block_size)))
        sizes = self.device.decode_sizes(min(config.max_running, config.max_batched_tokens))
        self._buffers = StepBuffers(limits, self.device.torch_device, sizes=() if self._pooler else sizes)
        if not self._pooler:
            self.device.prepare(self.model, self.kv_cache, self._buffers)
        if self.device.compiles:
            self._warm_up(limits)

    def _measure_largest_step(self, config: EngineConfig, shape: KVCacheShape, limits: StepLimits) -> int:
        """Bytes beside the weights, buffers included; 0 where memory is not bounded, without computing it.

        Kernels are compiled and loaded by it, too, so what they keep is taken already when the KV cache is sized.
        """
        memory = self.device.memory
        if not memory.is_bounded:
            return 0
        plan = largest_step(limits, config.speculative_tokens, config.task == "embed")

        def run() -> None:
            self.forward_seconds = self.sample_seconds = 0.0
            self.kv_cache = KVCache(shape, 1, memory)
            self._buffers = StepBuffers(limits, self.device.torch_device)
            self.launch(plan).result()
            self._sampler.forget([planned.request_id for planned in plan.sequences])
            del self.kv_cache, self._buffers

        self._group.wait_for_all()  # one may load for much longer than a collective may take
        before = memory.free()
        try:
            return memory.measure_peak(run)
        except Exception as error:
            if not out_of_memory(error):
                raise
            tokens = sum(planned.count for planned in plan.sequences)
            raise EngineConfigError(
                f"a step of {tokens} tokens in {len(plan.sequences)} sequences does not fit into the {mib(before)} "
                f"that {memory} has free beside the weights; lower max_batched_tokens or max_running"
            ) from None
        finally:
            memory.trim()

    @property
    def device_name(self) -> str:
        return str(self.device)

    @property
    def num_blocks(self) -> int:
        return self.kv_cache.num_blocks

    @property
    def touched_blocks(self) -> int:
        """Those that have taken memory."""
        return self._buffers.highest_block + 1 if self.device.memory.reserves else self.num_blocks

    @property
    def progress(self) -> int:
        return self.model.layers_computed.value

    def _warm_up(self, limits: StepLimits) -> None:
        began = time.monotonic()
        most = min(limits.max_batched_tokens, limits.max_model_len - 1)
        embeds, has_adapters = self._pooler is not None, limits.adapter_slots > 0
        for plan in warm_up_plans(most, limits.block_size, embeds, has_adapters):
            self.launch(plan).result()
            ended = tuple(planned.request_id for planned in plan.sequences)
        self._sampler.forget(ended)
        self._buffers.fill(StepPlan((), ended))
        self.forward_seconds = self.sample_seconds = 0.0
        log.info("kernels are compiled, after %.1f s", time.monotonic() - began)

    def read_adapter(self, path: str) -> Adapter:
        return self._lora.read(path)

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        self._lora.add(name, adapter)

    def drop_adapter(self, name: str) -> None:
        self._lora.remove(name)

    @torch.inference_mode()
    def resize(self, num_blocks: int, moves: Mapping[int, int]) -> None:
        """Of the KV cache, as Scheduler.resize says; steps in flight are computed before.

        Raises BlockMoveError, after which this runner is of no use, or what torch does.
        """
        self.kv_cache.move(moves)
        is_elsewhere = True  # also if only some layers are
        try:
            is_elsewhere = self.kv_cache.resize(num_blocks)
            self._buffers.forget_blocks(num_blocks)
        finally:
            if not self._pooler:
                self.device.resized(self.model, self.kv_cache, self._buffers, is_elsewhere)

    def trim(self) -> None:
        self.device.memory.trim()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Hands the step to the device. A GPU computes it meanwhile; a CPU has done so on return.

        A later step may be launched before this one's result is taken.
        """
        began = self.device.moment()
        self._sampler.forget(plan.ended)
        for slot, name in plan.adapters:
            self._lora.put(slot, name)
        batch = self._buffers.fill(plan)
        with self.device.step(self.kv_cache, self._buffers.highest_block):
            hidden_TE = self.device.forward(self.model, batch, self.kv_cache)
            computed = self.device.moment()
            reported = self._prompt_logprobs(plan, batch, hidden_TE)
            embedded = self._pooler.embeddings(plan, batch.end_rows, hidden_TE) if self._pooler else _NO_EMBEDDINGS
            drawn = self._sample(hidden_TE, batch)
            download = Download((drawn, embedded, *(entries for _, entries in reported)))
            sampled = self.device.moment()

        def finish() -> StepResult:
            tokens, embeddings, *entries = download.wait()
            self.forward_seconds += began.until(computed)
            self.sample_seconds += computed.until(sampled)
            prompt: dict[int, tuple[list[TokenLogprob], ...]] = {}
            for (request_id, _), some in zip(reported, entries, strict=True):
                prompt[request_id] = (*prompt.get(request_id, ()), *some)
            return StepResult.of(plan, tokens, prompt, embeddings)

        return LaunchedStep(finish)

    @torch.inference_mode()
    def logits(self, token_ids: list[int], start: int, rows: slice) -> torch.Tensor:
        """logits_TV of some of a sequence's tokens, for measurements: no other sequence may be there.

        Tokens before `start` are in the cache from the calls before.
        """
        blocks = () if start else self._first_blocks
        plan = StepPlan((ScheduledSequence(0, start, tuple(token_ids), blocks),))
        batch = self._buffers.fill(plan)
        with self.device.step(self.kv_cache, self._buffers.highest_block):
            logits_TV = self.model.logits(self.device.forward(self.model, batch, self.kv_cache)[rows])
        assert logits_TV is not None  # there is one rank
        return logits_TV

    def _prompt_logprobs(
        self, plan: StepPlan, batch: StepBatch, hidden_TE: torch.Tensor
    ) -> list[tuple[int, Pending[list[list[TokenLogprob]]]]]:
        """In pieces of the prompts of these requests."""
        asked = [pair for pair in zip(plan.sequences, batch.end_rows, strict=True) if pair[0].next_prompt_ids]
        ids = {str(planned.request_id): np.array(planned.next_prompt_ids) for planned, _ in asked}
        sent = upload(ids, self.device.torch_device)
        reported: list[tuple[int, Pending[list[list[TokenLogprob]]]]] = []
        for planned, end in asked:
            start, ids_T = end - planned.count, sent[str(planned.request_id)]
            for first in range(0, len(ids_T), _LOGPROB_ROWS):
                some = ids_T[first : first + _LOGPROB_ROWS]
                logits_BV = self.model.logits(hidden_TE[start + first : start + first + len(some)])
                if logits_BV is not None:
                    entries = prompt_logprobs(logits_BV, some, planned.prompt_logprobs or 0)
                    reported.append((planned.request_id, entries))
        return reported

    def _sample(self, hidden_TE: torch.Tensor, batch: StepBatch) -> Pending[list[DrawnToken]]:
        if not len(batch.rows_R):
            return _NO_TOKENS
        logits_RV = self.model.logits(hidden_TE[batch.rows_R])
        if logits_RV is None:
            tokens_R, drawn = torch.empty_like(batch.rows_R), _NO_TOKENS
        else:
            sampled = self._sampler.sample(logits_RV, batch.sampling)
            tokens_R, drawn = sampled.tokens_R, sampled.drawn
        if self.steps_in_flight > 1:  # the next step may take them from there
            self._buffers.keep(batch, self._group.broadcast(tokens_R))
        return drawn


def _workspace(model: DecoderConfig, config: EngineConfig, dtype: torch.dtype) -> int:
    """Bytes that the largest step takes where none is measured: as `tidewright plan` estimates them."""
    size, rows = config.tensor_parallel_size, max(config.max_running, footprint.SCORED_ROWS)
    activations = footprint.step_bytes(model, dtype.itemsize, config.max_batched_tokens, size)
    return activations + rows * footprint.logits_bytes(model, dtype.itemsize, size)


def _check_fits(model: LlamaForCausalLM, memory: DeviceMemory) -> None:
    """Raises DeviceError. `model` has no memory of its own."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}  # tied weights are one
    pending = sum(module.pending_bytes for module in model.modules() if isinstance(module, LinearMethod))
    needed = sum(tensor.nbytes for tensor in tensors.values()) + pending
    if not memory.await_free(needed, PATIENCE):
        raise DeviceError(
            f"the weights take {mib(needed)}, but {memory} has {mib(memory.free())} free: end what else uses it, or "
            "use more ranks (tensor_parallel_size), or a smaller or quantized model"
        )


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
