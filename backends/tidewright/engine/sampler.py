"""From logits to the next token of each row, vectorised over the batch.

Chance enters only through `uniform(seed, position)`: no state, so a seeded request draws the same tokens alone,
in any batch, after a preemption and after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tidewright.engine.messages import TokenLogprob
from tidewright.engine.plan import Draw, DrawnToken
from tidewright.schema import SamplingParams

# Below this, dividing by the temperature leaves nothing but the maximum.
_GREEDY_BELOW = 1e-5
_MASK_64 = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on both arguments only: splitmix64's output number `position` after `seed`."""
    return (_mix(_mix(seed) + position * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def sample(logits_BV: torch.Tensor, draws: Sequence[Draw]) -> list[DrawnToken]:
    """One token for each row. `logits_BV` is used up."""
    logits_BV = logits_BV.float()
    wants_logprobs = [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]
    # Before any mask or temperature: logprobs tell what the model said.
    logprobs_RV = logits_BV[wants_logprobs].log_softmax(dim=-1) if wants_logprobs else None

    banned = [(row, token) for row, draw in enumerate(draws) for token in draw.banned_ids]
    if banned:
        logits_BV[[row for row, _ in banned], [token for _, token in banned]] = -torch.inf

    tokens_B = logits_BV.argmax(dim=-1)
    plain = [row for row, draw in enumerate(draws) if _is_random(draw.params) and not _is_filtered(draw.params)]
    filtered = [row for row, draw in enumerate(draws) if _is_random(draw.params) and _is_filtered(draw.params)]
    for rows, has_filter in ((plain, False), (filtered, True)):
        if rows:
            chosen = [draws[row] for row in rows]
            scaled_RV = _scale(logits_BV if len(rows) == len(draws) else logits_BV[rows], chosen)
            probs_RV = scaled_RV.softmax(dim=-1)
            if has_filter:
                probs_RV = _filter(probs_RV, [draw.params for draw in chosen])
            tokens_B[rows] = _invert_cdf(probs_RV, [uniform(d.params.seed or 0, d.position) for d in chosen])

    logprobs: list[list[TokenLogprob] | None] = [None] * len(draws)
    if logprobs_RV is not None:
        counts = [draws[row].params.logprobs or 0 for row in wants_logprobs]
        for row, entry in zip(wants_logprobs, _report(logprobs_RV, tokens_B[wants_logprobs], counts), strict=True):
            logprobs[row] = entry
    return [DrawnToken(*pair) for pair in zip(tokens_B.tolist(), logprobs, strict=True)]


def _is_random(params: SamplingParams) -> bool:
    return params.temperature >= _GREEDY_BELOW


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _column(values: Sequence[float], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]


def _scale(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    # The maximum goes first: a small temperature must not overflow.
    temperatures_R1 = _column([draw.params.temperature for draw in draws], logits_RV)
    return (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperatures_R1


def _filter(probs_RV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Zero for what top_k, then top_p of what that left, drop. Equals at the edge all stay.

    The edge is found as a probability, so the tokens keep their order and a seed keeps its meaning.
    """
    vocab_size = probs_RV.shape[1]
    kept = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    width = max(kept)
    if width < vocab_size:
        sorted_RW = probs_RV.topk(width, dim=-1).values
    else:
        sorted_RW = probs_RV.sort(dim=-1, descending=True).values
    kept_R1 = _column(kept, probs_RV, torch.int64)
    ranks_W = torch.arange(width, device=probs_RV.device)
    sorted_RW = sorted_RW.masked_fill(ranks_W >= kept_R1, 0)
    before_RW = sorted_RW.cumsum(dim=-1, dtype=torch.float64) - sorted_RW
    top_p_R1 = _column([p.top_p for p in params], probs_RV, torch.float64)
    # The first token always stays; after it, those before which the mass has not yet reached p.
    limit_R1 = top_p_R1 * sorted_RW.sum(dim=-1, keepdim=True, dtype=torch.float64)
    dropped_RW = (before_RW >= limit_R1) & (ranks_W > 0)
    dropped_RW |= ranks_W >= kept_R1
    last_kept_R1 = width - 1 - dropped_RW.sum(dim=-1, keepdim=True)
    return probs_RV.masked_fill(probs_RV < sorted_RW.gather(-1, last_kept_R1), 0)


def _invert_cdf(probs_RV: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """The token in whose stretch of the cumulative distribution u falls."""
    cdf_RV = probs_RV.cumsum(dim=-1, dtype=torch.float64)
    total_R1 = cdf_RV[:, -1:]
    # Rounding must not push u * total up to the total, behind the last token that has any probability.
    below_R1 = torch.nextafter(total_R1, torch.zeros_like(total_R1))
    targets_R1 = torch.minimum(_column(uniforms, cdf_RV) * total_R1, below_R1)
    tokens_R = torch.searchsorted(cdf_RV, targets_R1, right=True)[:, 0]
    # Logits that are not numbers must not become a token that is not in the vocabulary.
    return tokens_R.clamp(max=probs_RV.shape[1] - 1)


def prompt_logprobs(logits_BV: torch.Tensor, token_ids: Sequence[int], count: int) -> tuple[list[TokenLogprob], ...]:
    """Of the prompt tokens that follow the rows' positions, each with the `count` most likely ones."""
    logprobs_BV = logits_BV.float().log_softmax(dim=-1)
    tokens_B = torch.tensor(token_ids, device=logits_BV.device)
    return tuple(_report(logprobs_BV, tokens_B, [count] * len(token_ids)))


def _report(logprobs_RV: torch.Tensor, tokens_R: torch.Tensor, counts: Sequence[int]) -> list[list[TokenLogprob]]:
    """For each row the chosen token, then the `counts[row]` most likely ones."""
    chosen_R1 = logprobs_RV.gather(-1, tokens_R[:, None])
    ranks_R = (logprobs_RV > chosen_R1).sum(dim=-1) + 1
    top = logprobs_RV.topk(min(max(counts), logprobs_RV.shape[1]), dim=-1)
    return [
        [TokenLogprob(token, logprob, rank)]
        + [TokenLogprob(*entry, rank) for rank, entry in enumerate(zip(ids[:n], values[:n], strict=True), start=1)]
        for token, logprob, rank, ids, values, n in zip(
            tokens_R.tolist(),
            chosen_R1[:, 0].tolist(),
            ranks_R.tolist(),
            top.indices.tolist(),
            top.values.tolist(),
            counts,
            strict=True,
        )
    ]
