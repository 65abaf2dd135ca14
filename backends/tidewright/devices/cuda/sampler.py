"""Draws a step's tokens on the GPU: the host sends what it knows in one transfer, and waits for nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from tidewright.devices.cuda.place_counts import PlaceCounts
from tidewright.devices.cuda.sampling import sample, work_of
from tidewright.engine.messages import TokenLogprob
from tidewright.engine.plan import DrawnToken
from tidewright.sampling.guided import GuidedDecoding
from tidewright.sampling.logprobs import report
from tidewright.sampling.restrictions import Restrictions
from tidewright.sampling.sampler import Sampled, Sampler, is_of_device
from tidewright.step.sampling import SamplingBatch
from tidewright.step.transfers import Pending, upload

log = logging.getLogger(__name__)


class CudaSampler(Sampler):
    """The tokens of the sampler that it extends, which draws where this one can't."""

    def __init__(self, guided: GuidedDecoding, device: torch.device) -> None:
        super().__init__(guided)
        self._counts_of_places = PlaceCounts(device)
        self._bits_8 = torch.arange(8, dtype=torch.uint8, device=device)

    def sample(self, logits_RV: torch.Tensor, batch: SamplingBatch) -> Sampled:
        if batch.is_plain:
            tokens_R = sample(logits_RV, batch.device, work_of(batch.host, has_penalties=False))
            return Sampled(tokens_R, Pending((tokens_R,), _plain))
        # Draws after guesses have other histories than the sequence's, which has one row of counts.
        if any(draw.history.drafts and draw.params.has_penalties for draw in batch.draws):
            return super().sample(logits_RV, batch)
        try:
            return self._sample(logits_RV, batch)
        except Exception as error:
            if is_of_device(error):
                raise
            self._counts_of_places.doubt(batch)
            log.exception("a batch could not be sampled on the GPU; trying it on the host")
            return super().sample(logits_RV, batch)

    def forget(self, ended: Sequence[int]) -> None:
        super().forget(ended)
        self._counts_of_places.forget(ended)

    def _sample(self, logits_RV: torch.Tensor, batch: SamplingBatch) -> Sampled:
        draws, counts = batch.draws, self._counts_of_places
        vocab_size = logits_RV.shape[1]
        restrictions = Restrictions.of(draws, vocab_size, self._guided)
        wants_logprobs = [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]
        has_penalties = bool(batch.host.is_penalised.any())
        histories = counts.missing(batch) if has_penalties else {}

        arrays = _arrays(restrictions, vocab_size) | histories
        if wants_logprobs:
            arrays["wants_logprobs"] = np.array(wants_logprobs)
        sent = upload(arrays, logits_RV.device)

        changed_RV = self._restrict(logits_RV, sent) if restrictions.changes_logits else logits_RV
        rows_R: torch.Tensor | None = None
        if has_penalties:
            rows_R = counts.rows(batch, vocab_size, sent)
        work = work_of(batch.host, has_penalties)
        tokens_R = sample(changed_RV, batch.device, work, counts.counts, rows_R)
        if rows_R is not None:
            counts.add(batch, rows_R, tokens_R)

        entries: Pending[list[list[TokenLogprob]]] | None = None
        if wants_logprobs:
            asked_W = sent["wants_logprobs"]
            # Of the logits before any change: they tell what the model said.
            logprobs_WV = logits_RV.index_select(0, asked_W).float().log_softmax(dim=-1)
            widths = [draws[row].params.logprobs or 0 for row in wants_logprobs]
            entries = report(logprobs_WV, tokens_R.index_select(0, asked_W), widths)
        errors = restrictions.errors | batch.errors

        def read(parts: Sequence[torch.Tensor]) -> list[DrawnToken]:
            reported = dict(zip(wants_logprobs, entries.read(parts[1:]), strict=True)) if entries else {}
            return [
                DrawnToken(token, reported.get(row), errors.get(row, "")) for row, token in enumerate(parts[0].tolist())
            ]

        return Sampled(tokens_R, Pending((tokens_R, *(entries.parts if entries else ())), read))

    def _restrict(self, logits_RV: torch.Tensor, sent: dict[str, torch.Tensor]) -> torch.Tensor:
        """`logits.restrict` of a copy."""
        vocab_size = logits_RV.shape[1]
        changed_RV = logits_RV.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        all_X = changed_RV.view(-1)
        if "allowed_rows" in sent:
            bits_CI8 = (sent["allowed"][:, None] >> self._bits_8) & 1
            rows_C = sent["allowed_rows"]
            forbidden_CV = bits_CI8.view(len(rows_C), -1)[:, :vocab_size] == 0
            kept_CV = changed_RV.index_select(0, rows_C).masked_fill_(forbidden_CV, -torch.inf)
            changed_RV.index_copy_(0, rows_C, kept_CV)
        if "banned" in sent:
            all_X.index_fill_(0, sent["banned"], -torch.inf)
        if "biased" in sent:
            at_X = sent["biased"]
            all_X.index_copy_(0, at_X, all_X.index_select(0, at_X) + sent["biases"])
        return changed_RV


def _plain(parts: Sequence[torch.Tensor]) -> list[DrawnToken]:
    return [DrawnToken(token) for token in parts[0].tolist()]


def _arrays(restrictions: Restrictions, vocab_size: int) -> dict[str, np.ndarray]:
    """One bit for each token of a row in `allowed`; places in the flat logits for bans and biases."""
    arrays: dict[str, np.ndarray] = {}
    if restrictions.allowed:
        arrays["allowed_rows"] = np.array([*restrictions.allowed])
        arrays["allowed"] = np.packbits(np.stack([*restrictions.allowed.values()]), axis=1, bitorder="little").ravel()
    if restrictions.banned:
        arrays["banned"] = np.array([row * vocab_size + token for row, token in restrictions.banned])
    if restrictions.biases:
        arrays["biased"] = np.array([row * vocab_size + token for row, token, _ in restrictions.biases])
        arrays["biases"] = np.array([bias for _, _, bias in restrictions.biases], np.float32)
    return arrays
