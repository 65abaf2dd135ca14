"""A slow, plain sampler in numpy and float64: what sampling/sampler.py must agree with."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tidewright.engine.plan import Draw
from tidewright.schema import SamplingParams


def kept_tokens(probs: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Which tokens stay: min_p, then top_k of those, then top_p of those; equals at an edge all stay."""
    kept = probs >= params.min_p * probs.max()
    if 0 < params.top_k < kept.sum():
        kept &= probs >= np.sort(probs[kept])[-params.top_k]
    if params.top_p < 1:
        mass = probs[kept].sum()
        more_likely = {p: probs[kept & (probs > p)].sum() for p in np.unique(probs[kept])}
        kept &= np.array([more_likely.get(p, mass) < params.top_p * mass or p == probs.max() for p in probs])
    return kept


def changed_logits(logits: np.ndarray, draw: Draw) -> np.ndarray:
    """After bans, bias and penalties."""
    params, changed = draw.params, logits.astype(np.float64)
    if params.allowed_token_ids is not None:
        changed[[token not in params.allowed_token_ids for token in range(len(changed))]] = -np.inf
    history = [*draw.history.token_ids[: draw.history.length], *draw.history.drafts]
    output = Counter(history[draw.history.prompt_length :])
    for token in draw.banned_ids:
        changed[token] = -np.inf
    for *rest, last in draw.bad_words_ids:
        if not rest or history[-len(rest) :] == rest:
            changed[last] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        changed[token] += bias
    for token in set(history):
        factor = params.repetition_penalty
        changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
        changed[token] -= params.frequency_penalty * output[token] + params.presence_penalty * (output[token] > 0)
    return changed


def distribution(logits: np.ndarray, draw: Draw) -> np.ndarray:
    changed = changed_logits(logits, draw)
    if draw.params.temperature == 0:
        return np.eye(len(changed))[changed.argmax()]
    probs = np.exp((changed - changed.max()) / draw.params.temperature)
    probs /= probs.sum()
    probs *= kept_tokens(probs, draw.params)
    return probs / probs.sum()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float((((counts - expected) ** 2) / expected).sum())


def chi_square_limit(degrees: int) -> float:
    """What a right sampler exceeds once in 1000 times (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.09 * spread**0.5) ** 3
