"""Runs a plan on onnxruntime: the runner of the fallback, which computes with none of the main model's code.

The cache is not paged: each sequence has keys and values of its own, and those that decode together lie in one batch,
padded on the left. As long as the same sequences decode, that batch stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from tidewright.devices.cpu.memory import CpuMemory
from tidewright.devices.cpu.step_threads import set_threads
from tidewright.engine.messages import EngineConfig, TokenLogprob
from tidewright.engine.plan import Draw, DrawnToken, ScheduledSequence, StepPlan, StepResult
from tidewright.engine.pool import pool_size
from tidewright.engine.runner import USEFUL_TOKENS, EngineConfigError, LaunchedStep
from tidewright.kv_cache.storage import KVCacheShape
from tidewright.lora.adapter import Adapter
from tidewright.lora.config import AdapterError
from tidewright.memory.account import FixedMemory
from tidewright.onnx_export.manifest import (
    PRECISIONS,
    load_manifest,
    model_file,
)
from tidewright.onnx_export.session import OnnxDecoder, Past, Sequences
from tidewright.sampling.guided import GuidedDecoding
from tidewright.sampling.logprobs import prompt_logprobs
from tidewright.sampling.sampler import Sampler
from tidewright.step.sampling import SamplingBatch


class OnnxRunner:
    """Raises EngineConfigError, IncompleteExportError, KVCacheMemoryError or OnnxModelError."""

    def __init__(self, config: EngineConfig) -> None:
        if config.kv_cache_dtype != "auto":
            raise EngineConfigError(
                f"kv_cache_dtype is {config.kv_cache_dtype}, but an ONNX model has a KV cache of its own format; "
                "choose auto"
            )
        folder = Path(config.model_dir)
        manifest = load_manifest(folder)
        precision = next(name for name in PRECISIONS if name in manifest.files)  # int8 if there is it
        threads = set_threads(config.threads, sharers=1)  # torch's are for sampling
        self._decoder = OnnxDecoder(folder / model_file(precision), threads, config.device)
        self.device_name = self._decoder.device
        self.vocab_size, self.eos_ids = manifest.vocab_size, manifest.source.eos_token_ids
        self.guided = GuidedDecoding(folder / "tokenizer.json", self.vocab_size, self.eos_ids)
        self._sampler = Sampler(self.guided)
        wanted = min(config.max_model_len or manifest.max_length, manifest.max_length)
        shape = KVCacheShape(
            manifest.num_layers, manifest.num_kv_heads, manifest.head_dim, config.block_size, torch.float32
        )
        needed = min(wanted, USEFUL_TOKENS)
        weights = (folder / model_file(precision)).stat().st_size
        size = pool_size(config, shape, needed, CpuMemory(), weights, workspace=0)
        self.num_blocks = self.touched_blocks = size.num_blocks
        self.fixed_memory = FixedMemory(size.budget, weights, 0, shape.bytes_per_block, size.most_blocks)
        self.max_model_len = min(wanted, config.first_max_model_len or wanted, self.num_blocks * config.block_size)
        self.progress, self.steps_in_flight, self.adapter_slots = 0, 1, 0
        self.forward_seconds = self.sample_seconds = 0.0
        self.embedding_size = 0
        self._past: dict[int, Past] = {}  # of one sequence each: [1, K, C, D], without padding
        self._together: tuple[int, ...] = ()  # who decodes in `_batch`
        self._batch: Sequences | None = None

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Computes the step at once."""
        began = time.monotonic()
        self._sampler.forget(plan.ended)
        # The blocks of both are free again, so their pasts would be outside of `kv_cache_memory`.
        for request_id in (*plan.ended, *plan.preempted):
            self._past.pop(request_id, None)
            if request_id in self._together:
                self._batch = None
        decoding = [
            planned
            for planned in plan.sequences
            if planned.count == 1 and planned.start and not planned.next_prompt_ids  # which are reported on
        ]
        logits = self._decode(decoding)  # [V] after the last token of each request
        reported: dict[int, tuple[list[TokenLogprob], ...]] = {}
        for planned in plan.sequences:
            if planned.request_id not in logits:
                rows_TV = self._prefill(planned)
                logits[planned.request_id] = rows_TV[-1]
                if ids := planned.next_prompt_ids:
                    of_prompt_TV = torch.from_numpy(rows_TV[: len(ids)])
                    entries = prompt_logprobs(of_prompt_TV, torch.tensor(ids), planned.prompt_logprobs or 0).now()
                    reported[planned.request_id] = tuple(entries)
        computed = time.monotonic()
        result = StepResult.of(plan, self._sample(plan.sequences, logits), reported)
        self.forward_seconds += computed - began
        self.sample_seconds += time.monotonic() - computed
        return LaunchedStep(lambda: result)

    def read_adapter(self, path: str) -> Adapter:
        raise AdapterError("an ONNX model takes no LoRA adapters")

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """There is none."""

    def drop_adapter(self, name: str) -> None:
        """There is none."""

    def resize(self, num_blocks: int, moves: Mapping[int, int]) -> None:
        """Sequences have memory of their own: blocks only limit it."""
        self.num_blocks = num_blocks

    def trim(self) -> None:
        """Sequences begin anew, and must not go on with the past of a step that was not computed."""
        self._past.clear()
        self._batch = None

    def _decode(self, decoding: Sequence[ScheduledSequence]) -> dict[int, np.ndarray]:
        if not decoding:
            return {}
        ids = tuple(planned.request_id for planned in decoding)
        if self._batch is None or self._together != ids:
            self._together, self._batch = ids, self._decoder.join([self._past[request_id] for request_id in ids])
        self._batch.add([planned.token_ids[0] for planned in decoding])
        self.progress += 1
        for row, request_id in enumerate(ids):
            self._past[request_id] = self._batch.past_of(row)
        return dict(zip(ids, self._batch.logits_BV, strict=True))

    def _prefill(self, planned: ScheduledSequence) -> np.ndarray:
        """logits_TV of the tokens of one sequence behind those that it has, which are none if it starts anew.

        The graph gives the logits of the last token only: T is 1, but all tokens if there is to be a report on them,
        which takes a run for each.
        """
        if planned.request_id in self._together:
            self._batch = None  # it reads several tokens, alone
        past = self._past[planned.request_id] if planned.start else self._decoder.empty_past(1)
        sequence = self._decoder.join([past])
        rows: list[np.ndarray] = []
        num_runs = planned.count if planned.next_prompt_ids else 1
        for piece_1T in np.split(np.array([planned.token_ids]), num_runs, axis=1):
            sequence.read(piece_1T, np.ones_like(piece_1T))
            rows.append(sequence.logits_BV)
            self.progress += 1
        self._past[planned.request_id] = sequence.past_of(0)
        return np.concatenate(rows)

    def _sample(self, sequences: Sequence[ScheduledSequence], logits: dict[int, np.ndarray]) -> list[DrawnToken]:
        draws: list[Draw] = []
        rows: list[np.ndarray] = []
        for planned in sequences:
            assert len(planned.draws) <= 1  # without speculation
            draws += planned.draws
            rows += [logits[planned.request_id]] * len(planned.draws)
        if not draws:
            return []
        return self._sampler.sample(torch.from_numpy(np.stack(rows)), SamplingBatch.of(draws)).drawn.now()
