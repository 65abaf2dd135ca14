"""Changes to logits before a token is drawn: bans, bias, penalties. They touch single entries, never whole rows."""

from __future__ import annotations

import numpy as np
import torch

from tidewright.engine.plan import Draw
from tidewright.sampling.restrictions import Restrictions
from tidewright.sampling.token_counts import TokenCounts
from tidewright.step.sampling import SamplingBatch


def restrict(logits_BV: torch.Tensor, restrictions: Restrictions) -> None:
    """Bans what the rows may not have, and adds their biases."""
    for row, allowed_V in restrictions.allowed.items():
        logits_BV[row].masked_fill_(torch.from_numpy(allowed_V == 0).to(logits_BV.device), -torch.inf)
    if restrictions.banned:
        rows, tokens = zip(*restrictions.banned, strict=True)
        logits_BV[list(rows), list(tokens)] = -torch.inf
    if restrictions.biases:
        rows, tokens, biases = zip(*restrictions.biases, strict=True)
        logits_BV[list(rows), list(tokens)] += torch.tensor(biases, device=logits_BV.device)


def penalise(logits_BV: torch.Tensor, batch: SamplingBatch, counts: TokenCounts) -> None:
    """Repetition penalty (Keskar et al. 2019, CTRL) of prompt and output, then frequency and presence of the output."""
    rows = [row for row in np.flatnonzero(batch.host.is_penalised).tolist() if batch.draws[row].history.length]
    if not rows:
        return
    params = batch.host[rows]
    entries = [
        _penalised(batch.draws[row], counts, repeats)
        for row, repeats in zip(rows, (params.repetition_penalty != 1.0).tolist(), strict=True)
    ]
    sizes = [len(tokens) for tokens, _ in entries]

    def spread(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.repeat(values, sizes)).to(logits_BV.device)

    rows_X = spread(np.array(rows))
    tokens_X = torch.from_numpy(np.concatenate([tokens for tokens, _ in entries])).to(logits_BV.device)
    counts_X = torch.from_numpy(np.concatenate([counts for _, counts in entries])).to(logits_BV.device)
    repetition_X = spread(params.repetition_penalty)
    logits_X = logits_BV[rows_X, tokens_X].double()
    logits_X = torch.where(logits_X > 0, logits_X / repetition_X, logits_X * repetition_X)
    logits_X -= spread(params.frequency_penalty) * counts_X
    logits_X -= spread(params.presence_penalty) * (counts_X > 0)
    logits_BV[rows_X, tokens_X] = logits_X.float()


def _penalised(draw: Draw, counts: TokenCounts, repeats: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and how often each is in the output. `repeats`: with those that only the prompt has."""
    tokens, numbers = counts.of(draw)
    if repeats:
        return tokens, numbers
    output = np.flatnonzero(numbers)
    return tokens[output], numbers[output]
