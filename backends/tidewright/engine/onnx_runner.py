"""Runs a plan on onnxruntime: the model runner of the fallback, which shares no code with what it stands in for.

The cache is not paged: each sequence has keys and values of its own, and those that decode together lie in one batch,
padded on the left. As long as the same sequences decode, that batch stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from tidewright.engine.guided import GuidedDecoding
from tidewright.engine.messages import EngineConfig, TokenLogprob
from tidewright.engine.plan import Draw, ScheduledSequence, SequenceResult, StepPlan, StepResult
from tidewright.engine.runner import USEFUL_TOKENS, EngineConfigError
from tidewright.engine.sampler import prompt_logprobs, sample
from tidewright.kv_cache.storage import KVCacheShape, count_blocks
from tidewright.onnx_export.manifest import MANIFEST, Manifest, model_file, read_manifest, tokenizer_sha256
from tidewright.onnx_export.session import OnnxDecoder

_PRECISIONS = ("int8", "float32")  # the first that there is

Past = list[np.ndarray]
"""Keys and values of all layers: [B, K, C, D] each, C cached positions."""


class OnnxRunner:
    """Raises EngineConfigError, KVCacheMemoryError or OnnxModelError."""

    def __init__(self, config: EngineConfig) -> None:
        folder = Path(config.onnx_dir)
        manifest = _manifest(folder, Path(config.model_dir))
        precision = next(name for name in _PRECISIONS if name in manifest.files)
        self._decoder = OnnxDecoder(folder / model_file(precision), config.threads, config.device)
        self.device_name = self._decoder.device
        if config.threads:
            torch.set_num_threads(config.threads)  # for sampling
        self.vocab_size, self.eos_ids = manifest.vocab_size, manifest.source.eos_token_ids
        self._guided = GuidedDecoding(Path(config.model_dir) / "tokenizer.json", self.vocab_size, self.eos_ids)
        wanted = min(config.max_model_len or manifest.max_length, manifest.max_length)
        shape = KVCacheShape(
            manifest.num_layers, manifest.num_kv_heads, manifest.head_dim, config.block_size, torch.float32
        )
        needed = min(wanted, USEFUL_TOKENS)
        self.num_blocks = count_blocks(shape, config.kv_cache_memory, needed, torch.device("cpu"))
        self.max_model_len = min(wanted, self.num_blocks * config.block_size)
        self.progress = 0
        self.sample_seconds = 0.0
        self._past: dict[int, Past] = {}  # of one sequence each: [1, K, C, D], without padding
        self._batch: _Batch | None = None

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        self._guided.forget(plan.ended)
        for request_id in plan.ended:
            self._past.pop(request_id, None)
        decoding = [planned for planned in plan.sequences if planned.count == 1 and planned.start]
        logits: dict[int, np.ndarray] = {}  # [V] after the last token
        reported: dict[int, tuple[list[TokenLogprob], ...]] = {}
        if decoding:
            logits |= self._decode(decoding)
        for planned in plan.sequences:
            if planned not in decoding:
                logits[planned.request_id] = self._prefill(planned, reported)
        began = time.monotonic()
        drawn = iter(self._sample(plan.sequences, logits))
        results = tuple(
            SequenceResult(tuple(islice(drawn, len(planned.draws))), reported.get(planned.request_id, ()))
            for planned in plan.sequences
        )
        self.sample_seconds += time.monotonic() - began
        return StepResult(results)

    def _decode(self, decoding: Sequence[ScheduledSequence]) -> dict[int, np.ndarray]:
        ids = tuple(planned.request_id for planned in decoding)
        if self._batch is None or self._batch.request_ids != ids:
            self._batch = _Batch(ids, [self._past[request_id] for request_id in ids])
        logits_BV = self._batch.add(self._decoder, [planned.token_ids[0] for planned in decoding])
        self.progress += 1
        for row, request_id in enumerate(ids):
            self._past[request_id] = self._batch.past_of(row)
        return dict(zip(ids, logits_BV, strict=True))

    def _prefill(self, planned: ScheduledSequence, reported: dict[int, tuple[list[TokenLogprob], ...]]) -> np.ndarray:
        """The tokens of one sequence behind those that it has, which are none if it starts anew."""
        past = self._past[planned.request_id] if planned.start else self._decoder.empty_past(1)
        if self._batch is not None and planned.request_id in self._batch.request_ids:
            self._batch = None  # it was preempted, and begins anew
        # The graph gives the logits of the last token only, so a report on the prompt takes a run for each.
        wants_report = planned.prompt_logprobs is not None
        pieces = [[token] for token in planned.token_ids] if wants_report else [list(planned.token_ids)]
        rows: list[np.ndarray] = []
        for piece in pieces:
            cached = past[0].shape[2]
            mask_1C = np.ones((1, cached + len(piece)), dtype=np.int64)
            positions_1T = np.arange(cached, cached + len(piece), dtype=np.int64)[None]
            logits_1V, past = self._decoder.run(np.array([piece]), mask_1C, positions_1T, past)
            rows.append(logits_1V[0])
            self.progress += 1
        self._past[planned.request_id] = past
        if wants_report:
            ids = planned.next_prompt_ids
            logits_TV = torch.from_numpy(np.stack(rows[: len(ids)])) if ids else torch.empty(0, self.vocab_size)
            reported[planned.request_id] = prompt_logprobs(logits_TV, ids, planned.prompt_logprobs or 0) if ids else ()
        return rows[-1]

    def _sample(self, sequences: Sequence[ScheduledSequence], logits: dict[int, np.ndarray]) -> list:
        draws: list[Draw] = []
        rows: list[np.ndarray] = []
        for planned in sequences:
            assert len(planned.draws) <= 1  # without speculation
            draws += planned.draws
            rows += [logits[planned.request_id]] * len(planned.draws)
        return sample(torch.from_numpy(np.stack(rows)), draws, self._guided) if draws else []


class _Batch:
    """Sequences that decode together. Positions of padding are masked, so no sequence sees another's length."""

    def __init__(self, request_ids: tuple[int, ...], pasts: list[Past]) -> None:
        self.request_ids = request_ids
        lengths = [past[0].shape[2] for past in pasts]
        longest = max(lengths)
        self._padding = [longest - length for length in lengths]
        self._lengths_B = np.array(lengths, dtype=np.int64)
        self._mask_BC = np.ones((len(pasts), longest), dtype=np.int64)
        for row, padding in enumerate(self._padding):
            self._mask_BC[row, :padding] = 0
        self._past = [
            np.concatenate(
                [
                    np.pad(array, ((0, 0), (0, 0), (padding, 0), (0, 0)))
                    for array, padding in zip(arrays, self._padding, strict=True)
                ]
            )
            for arrays in zip(*pasts, strict=True)
        ]

    def add(self, decoder: OnnxDecoder, token_ids: list[int]) -> np.ndarray:
        """One more token for each; logits_BV."""
        ids_B1 = np.array(token_ids, dtype=np.int64)[:, None]
        self._mask_BC = np.concatenate([self._mask_BC, np.ones_like(ids_B1)], axis=1)
        logits_BV, self._past = decoder.run(ids_B1, self._mask_BC, self._lengths_B[:, None], self._past)
        self._lengths_B += 1
        return logits_BV

    def past_of(self, row: int) -> Past:
        """Views, without the padding."""
        return [array[row : row + 1, :, self._padding[row] :] for array in self._past]


def _manifest(folder: Path, model_dir: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise EngineConfigError(
            f"{folder} holds no complete ONNX export of this version ({MANIFEST}); run `tidewright prepare`"
        )
    if manifest.source.tokenizer_sha256 != tokenizer_sha256(model_dir):
        raise EngineConfigError(
            f"the ONNX model in {folder} has another tokenizer than {model_dir}, so its token ids mean something else; "
            "make it from a model with the same tokenizer"
        )
    return manifest
