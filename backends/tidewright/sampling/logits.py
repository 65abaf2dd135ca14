"""Changes to logits before a token is drawn: bans, bias, penalties. They touch single entries, never whole rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from tidewright.engine.plan import Draw
from tidewright.sampling.token_counts import TokenCounts
from tidewright.step.sampling import SamplingBatch


def keep_allowed(logits_BV: torch.Tensor, draws: Sequence[Draw]) -> dict[int, str]:
    """Bans all but `allowed_token_ids` in the rows that have them.

    Returns:
        What went wrong, by row: a grammar leaves none of them.
    """
    errors: dict[int, str] = {}
    for row, draw in enumerate(draws):
        if draw.params.allowed_token_ids is None:
            continue
        allowed_X = torch.tensor(draw.params.allowed_token_ids, device=logits_BV.device)
        kept_X = logits_BV[row, allowed_X]
        logits_BV[row] = -torch.inf
        logits_BV[row, allowed_X] = kept_X
        if draw.params.guided and bool((kept_X == -torch.inf).all()):
            errors[row] = "guided output failed: none of allowed_token_ids can follow"
    return errors


def ban_tokens(logits_BV: torch.Tensor, draws: Sequence[Draw]) -> None:
    """Bans `banned_ids`, and the last token of each bad word whose other tokens end the history.

    A grammar and allowed_token_ids go first: bad words, then all bans, give way where they would leave no token.
    """
    rows: list[int] = []
    tokens: list[int] = []
    for row, draw in enumerate(draws):
        banned = {*draw.banned_ids, *_ends_of_bad_words(draw)}
        if banned and (draw.params.guided or draw.params.allowed_token_ids is not None):
            candidates = (banned, set(draw.banned_ids))
            banned = next((some for some in candidates if _leaves_any(logits_BV[row], sorted(some))), set())
        rows += [row] * len(banned)
        tokens += banned
    if rows:
        logits_BV[rows, tokens] = -torch.inf


def _ends_of_bad_words(draw: Draw) -> Iterator[int]:
    for word in draw.bad_words_ids:
        if draw.history.tail(len(word) - 1) == word[:-1]:
            yield word[-1]


def _leaves_any(logits_V: torch.Tensor, banned: list[int]) -> bool:
    return bool((logits_V > -torch.inf).sum() > (logits_V[banned] > -torch.inf).sum())


def add_bias(logits_BV: torch.Tensor, draws: Sequence[Draw]) -> None:
    biases = [(row, entry) for row, draw in enumerate(draws) for entry in (draw.params.logit_bias or {}).items()]
    if biases:
        rows_X = torch.tensor([row for row, _ in biases], device=logits_BV.device)
        tokens_X = torch.tensor([token for _, (token, _) in biases], device=logits_BV.device)
        logits_BV[rows_X, tokens_X] += torch.tensor([bias for _, (_, bias) in biases], device=logits_BV.device)


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
