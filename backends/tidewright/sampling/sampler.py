"""From logits to the next token of each row, vectorised over the batch. A row pays only for what it asks for.

The only randomness is `lots.exponentials` of seed and position: no state, so a seeded request draws the same tokens
alone, in any batch, after a preemption and after a restart.
"""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tidewright.devices.memory import out_of_memory
from tidewright.engine.messages import TokenLogprob
from tidewright.engine.plan import Draw, DrawnToken
from tidewright.sampling.guided import GuidedDecoding
from tidewright.sampling.logits import penalise, restrict
from tidewright.sampling.logprobs import report
from tidewright.sampling.lots import exponentials
from tidewright.sampling.restrictions import Restrictions
from tidewright.sampling.token_counts import TokenCounts
from tidewright.sampling.truncation import drop_unlikely, first_argmax, num_lots, race
from tidewright.step.sampling import Columns, SamplingBatch, unusable
from tidewright.step.transfers import Pending

log = logging.getLogger(__name__)


def is_of_device(error: Exception) -> bool:
    """Not the doing of one request."""
    return isinstance(error, torch.AcceleratorError) or bool(out_of_memory(error))


@dataclass(frozen=True, eq=False)
class Sampled:
    """The tokens of a step's rows: as the device has them, and as the engine reads them."""

    tokens_R: torch.Tensor  # int64; of a row with an error it means nothing
    drawn: Pending[list[DrawnToken]]


Choose = Callable[[torch.Tensor, SamplingBatch, TokenCounts], torch.Tensor]
"""tokens_R, int64, of logits_RV, which it leaves as they are: penalties, temperature, truncation and the draw."""


class Sampler:
    """Draws for the requests of one model, and keeps what it knows of each of them. `choose`: None is plain torch."""

    def __init__(self, guided: GuidedDecoding, choose: Choose | None = None) -> None:
        self._guided, self._counts, self._choose = guided, TokenCounts(), choose or choose_in_torch

    def sample(self, logits_RV: torch.Tensor, batch: SamplingBatch) -> Sampled:
        """As `sample`; waits for the device."""
        return sample(logits_RV, batch, self._guided, self._counts, self._choose)

    def forget(self, ended: Sequence[int]) -> None:
        self._guided.forget(ended)
        self._counts.forget(ended)


def sample(
    logits_RV: torch.Tensor,
    batch: SamplingBatch,
    guided: GuidedDecoding | None = None,
    counts: TokenCounts | None = None,
    choose: Choose | None = None,
) -> Sampled:
    """One token for each row; without `guided` no grammar is followed, without `counts` all histories are counted.

    A row that fails by its request's parameters has an error and ends that request; the others go on. Only rank 0
    samples, and the other ranks learn of the error with the tokens: all decide the same.
    """
    counts, choose = counts or TokenCounts(), choose or choose_in_torch
    try:
        tokens_R, drawn = _sample(logits_RV, batch, guided, counts, choose)
    except Exception as error:
        if is_of_device(error):
            raise
        log.exception("a batch could not be sampled; trying its rows one by one")
        drawn = [
            _sample_alone(logits_RV[row : row + 1], draw, guided, counts, choose)
            for row, draw in enumerate(batch.draws)
        ]
        if len(drawn) > 1 and all(token.error for token in drawn):
            raise error from None  # nobody's parameters
        tokens_R = torch.tensor([token.token_id for token in drawn], device=logits_RV.device)
    return Sampled(tokens_R, Pending((), lambda _: drawn))


def _sample_alone(
    logits_1V: torch.Tensor, draw: Draw, guided: GuidedDecoding | None, counts: TokenCounts, choose: Choose
) -> DrawnToken:
    try:
        return _sample(logits_1V, SamplingBatch.of([draw], logits_1V.device), guided, counts, choose)[1][0]
    except Exception as error:
        if is_of_device(error):
            raise
        return DrawnToken(0, error=unusable(error))


def _sample(
    logits_RV: torch.Tensor, batch: SamplingBatch, guided: GuidedDecoding | None, counts: TokenCounts, choose: Choose
) -> tuple[torch.Tensor, list[DrawnToken]]:
    """The order is: raw log-probabilities for the report; grammar, allowed ids, banned ids and bad words; bias;
    penalties; temperature; min_p, top_k, top_p, each of what the one before left; the draw.
    """
    draws = batch.draws
    if batch.is_plain:
        tokens_R = choose(logits_RV, batch, counts)
        return tokens_R, [DrawnToken(token) for token in tokens_R.tolist()]

    restrictions = Restrictions.of(draws, logits_RV.shape[1], guided)
    changed_RV = logits_RV
    if restrictions.changes_logits:
        changed_RV = logits_RV.to(torch.float32, copy=True)
        restrict(changed_RV, restrictions)
    tokens_R = choose(changed_RV, batch, counts)
    errors = restrictions.errors | batch.errors

    logprobs: list[list[TokenLogprob] | None] = [None] * len(draws)
    if wants_logprobs := [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]:
        # Of the logits before any change: logprobs tell what the model said.
        logprobs_WV = logits_RV[wants_logprobs].float().log_softmax(dim=-1)
        widths = [draws[row].params.logprobs or 0 for row in wants_logprobs]
        for row, entry in zip(wants_logprobs, report(logprobs_WV, tokens_R[wants_logprobs], widths).now(), strict=True):
            logprobs[row] = entry
    return tokens_R, [
        DrawnToken(token, logprobs[row], errors.get(row, "")) for row, token in enumerate(tokens_R.tolist())
    ]


def choose_in_torch(logits_RV: torch.Tensor, batch: SamplingBatch, counts: TokenCounts) -> torch.Tensor:
    """`Choose` for any device; waits for it."""
    logits_RV = logits_RV.to(torch.float32, copy=not batch.is_plain)
    if not batch.is_plain:
        penalise(logits_RV, batch, counts)
    random = np.flatnonzero(batch.host.is_random).tolist()
    if len(random) == len(logits_RV):
        return _draw(logits_RV, batch.host, batch.device)
    tokens_R = first_argmax(logits_RV)
    if random:
        tokens_R[random] = _draw(logits_RV[random], batch.host[random], batch.device[random])
    return tokens_R


def _draw(logits_RV: torch.Tensor, host: Columns[np.ndarray], params: Columns[torch.Tensor]) -> torch.Tensor:
    """`host` has the same numbers as `params`, to decide by without waiting for the device."""
    # The maximum goes first: a small temperature must not overflow.
    scaled_RV = logits_RV - logits_RV.amax(dim=-1, keepdim=True)
    probs_RV = scaled_RV.div_(params.temperature[:, None]).softmax(dim=-1)
    filtered = np.flatnonzero(host.is_filtered).tolist()
    if filtered:
        kept_RV = probs_RV if len(filtered) == len(probs_RV) else probs_RV[filtered]
        drop_unlikely(kept_RV, params if kept_RV is probs_RV else params[filtered])
        if kept_RV is not probs_RV:
            probs_RV[filtered] = kept_RV
    seeds_and_positions = list(zip(host.seed.tolist(), host.position.tolist(), strict=True))
    lots_RE = exponentials(seeds_and_positions, num_lots(probs_RV.shape[1]))
    tokens_R, valid_R = race(probs_RV, torch.from_numpy(lots_RE).to(probs_RV.device))
    if not valid_R.all():
        # NaN, infinity, or nothing but bans: no distribution, but a token of the vocabulary all the same.
        tokens_R = torch.where(valid_R, tokens_R, first_argmax(logits_RV))
    return tokens_R
