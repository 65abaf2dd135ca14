"""Embeddings: pools the final hidden states of prompts, chunk by chunk, into one vector each. Draws no tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from tidewright.engine.plan import StepPlan
from tidewright.schema import Pooling
from tidewright.step.transfers import Pending


class Pooler:
    def __init__(self, pooling: Pooling, normalize: bool, norm: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """`norm`: the model's final norm."""
        self._pooling, self._normalize, self._norm = pooling, normalize, norm
        # For the mean: sum_E of the tokens so far, of prompts that are partly computed.
        self._sums: dict[int, torch.Tensor] = {}

    def embeddings(self, plan: StepPlan, end_rows: Sequence[int], hidden_TE: torch.Tensor) -> Pending[dict[int, bytes]]:
        """Embeddings of the prompts that the step completes, as little-endian float32, by request.

        Args:
            end_rows: for each sequence of the plan, the row after its last one in `hidden_TE`.
            hidden_TE: of the last layer, before the final norm.
        """
        for request_id in plan.ended:
            self._sums.pop(request_id, None)
        done = [planned.request_id for planned in plan.sequences if planned.embeds]
        means = self._means(plan, end_rows, self._norm(hidden_TE).float()) if self._pooling == "mean" else []
        if not done:
            return Pending((), lambda _: {})
        if self._pooling == "mean":
            vectors_BE = torch.stack(means)
        else:
            pairs = zip(plan.sequences, end_rows, strict=True)
            last_rows = [hidden_TE[end - 1] for planned, end in pairs if planned.embeds]  # no upload of an index
            vectors_BE = self._norm(torch.stack(last_rows)).float()
        if self._normalize:
            vectors_BE = F.normalize(vectors_BE, dim=-1)

        def read(parts: Sequence[torch.Tensor]) -> dict[int, bytes]:
            rows_BE = parts[0].numpy().astype("<f4")
            return {request_id: row_E.tobytes() for request_id, row_E in zip(done, rows_BE, strict=True)}

        return Pending((vectors_BE,), read)

    def _means(self, plan: StepPlan, end_rows: Sequence[int], normed_TE: torch.Tensor) -> list[torch.Tensor]:
        """Of the prompts that the step completes. A chunk at position 0 begins anew, as after a preemption."""
        means: list[torch.Tensor] = []
        for planned, end in zip(plan.sequences, end_rows, strict=True):
            sum_E = normed_TE[end - planned.count : end].sum(dim=0)
            before_E = self._sums.pop(planned.request_id, None)
            if planned.start:
                assert before_E is not None  # nothing is skipped: see `make_scheduler`
                sum_E += before_E
            if planned.embeds:
                means.append(sum_E / (planned.start + planned.count))
            else:
                self._sums[planned.request_id] = sum_E
        return means
