"""From logits to the next token of each row, vectorised over the batch. A row pays only for what it asks for.

The only randomness is `lots.exponentials` of seed and position: no state, so a seeded request draws the same tokens
alone, in any batch, after a preemption and after a restart.
"""

# ruff: noqa: N815 - fields, too, carry their shape

from __future__ import annotations

import logging
from collections.abc import Sequence
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


class Sampler:
    """Draws for the requests of one model, in plain torch, and keeps what it knows of each of them."""

    def __init__(self, guided: GuidedDecoding) -> None:
        self._guided, self._counts = guided, TokenCounts()

    def sample(self, logits_RV: torch.Tensor, batch: SamplingBatch) -> Sampled:
        """As `sample`; waits for the device."""
        drawn = sample(logits_RV, batch, self._guided, self._counts)
        tokens_R = torch.tensor([token.token_id for token in drawn], device=logits_RV.device)
        return Sampled(tokens_R, Pending((), lambda _: drawn))

    def forget(self, ended: Sequence[int]) -> None:
        self._guided.forget(ended)
        self._counts.forget(ended)


def sample(
    logits_BV: torch.Tensor,
    batch: SamplingBatch,
    guided: GuidedDecoding | None = None,
    counts: TokenCounts | None = None,
) -> list[DrawnToken]:
    """One token for each row; without `guided` no grammar is followed, without `counts` all histories are counted.

    A row that fails by its request's parameters has an error and ends that request; the others go on. Only rank 0
    samples, and the other ranks learn of the error with the tokens: all decide the same.
    """
    counts = TokenCounts() if counts is None else counts
    try:
        return _sample(logits_BV, batch, guided, counts)
    except Exception as error:
        if is_of_device(error):
            raise
        log.exception("a batch could not be sampled; trying its rows one by one")
        drawn = [_sample_alone(logits_BV[row : row + 1], draw, guided, counts) for row, draw in enumerate(batch.draws)]
        if len(drawn) > 1 and all(token.error for token in drawn):
            raise error from None  # nobody's parameters
        return drawn


def _sample_alone(
    logits_1V: torch.Tensor, draw: Draw, guided: GuidedDecoding | None, counts: TokenCounts
) -> DrawnToken:
    try:
        return _sample(logits_1V, SamplingBatch.of([draw], logits_1V.device), guided, counts)[0]
    except Exception as error:
        if is_of_device(error):
            raise
        return DrawnToken(0, error=unusable(error))


def _sample(
    logits_BV: torch.Tensor, batch: SamplingBatch, guided: GuidedDecoding | None, counts: TokenCounts
) -> list[DrawnToken]:
    """The order is: raw log-probabilities for the report; grammar, allowed ids, banned ids and bad words; bias;
    penalties; temperature; min_p, top_k, top_p, each of what the one before left; the draw.
    """
    draws = batch.draws
    logits_BV = logits_BV.to(torch.float32, copy=not batch.is_plain)  # the caller's stay as they are
    if batch.is_plain:
        return [DrawnToken(token) for token in _choose(logits_BV, batch).tolist()]
    wants_logprobs = [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]
    # Before any change: logprobs tell what the model said.
    logprobs_RV = logits_BV[wants_logprobs].log_softmax(dim=-1) if wants_logprobs else None

    restrictions = Restrictions.of(draws, logits_BV.shape[1], guided)
    restrict(logits_BV, restrictions)
    penalise(logits_BV, batch, counts)

    tokens_B = _choose(logits_BV, batch)
    errors = restrictions.errors | batch.errors

    logprobs: list[list[TokenLogprob] | None] = [None] * len(draws)
    if logprobs_RV is not None:
        widths = [draws[row].params.logprobs or 0 for row in wants_logprobs]
        for row, entry in zip(wants_logprobs, report(logprobs_RV, tokens_B[wants_logprobs], widths).now(), strict=True):
            logprobs[row] = entry
    return [DrawnToken(tokens, logprobs[row], errors.get(row, "")) for row, tokens in enumerate(tokens_B.tolist())]


def _choose(logits_BV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The most likely token of each row, or one drawn at random, as its temperature says."""
    random = np.flatnonzero(batch.host.is_random).tolist()
    if len(random) == len(logits_BV):
        return _draw(logits_BV, batch.host, batch.device)
    tokens_B = first_argmax(logits_BV)
    if random:
        tokens_B[random] = _draw(logits_BV[random], batch.host[random], batch.device[random])
    return tokens_B


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
