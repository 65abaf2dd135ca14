"""Reports of log-probabilities: the device finds them, the host writes them down."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tidewright.engine.messages import TokenLogprob
from tidewright.sampling.truncation import top
from tidewright.step.transfers import Pending


def report(
    logprobs_RV: torch.Tensor, tokens_R: torch.Tensor, counts: Sequence[int]
) -> Pending[list[list[TokenLogprob]]]:
    """For each row the chosen token, then the `counts[row]` most likely ones."""
    chosen_R1 = logprobs_RV.gather(-1, tokens_R[:, None])
    ranks_R = (logprobs_RV > chosen_R1).sum(dim=-1) + 1
    values_RW, ids_RW = top(logprobs_RV, min(max(counts), logprobs_RV.shape[1]))

    def read(parts: Sequence[torch.Tensor]) -> list[list[TokenLogprob]]:
        return [
            [TokenLogprob(token, logprob, rank)]
            + [TokenLogprob(*entry, rank) for rank, entry in enumerate(zip(ids[:n], values[:n], strict=True), start=1)]
            for token, logprob, rank, ids, values, n in zip(*(part.tolist() for part in parts), counts, strict=True)
        ]

    return Pending((tokens_R, chosen_R1[:, 0], ranks_R, ids_RW, values_RW), read)


def prompt_logprobs(logits_BV: torch.Tensor, tokens_B: torch.Tensor, count: int) -> Pending[list[list[TokenLogprob]]]:
    """Of the prompt tokens that follow the rows' positions, each with the `count` most likely ones."""
    return report(logits_BV.float().log_softmax(dim=-1), tokens_B, [count] * len(tokens_B))
