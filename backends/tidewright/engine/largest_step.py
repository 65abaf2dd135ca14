"""The step that takes most memory, to be measured before the KV cache is allocated: its plan."""

from __future__ import annotations

from tidewright.engine.plan import Draw, History, ScheduledSequence, StepPlan
from tidewright.schema import SamplingParams
from tidewright.step.buffers import StepLimits

_CONTEXT = 4096  # tokens; a longer one takes longer to attend to, and hardly more memory
# Each kind of work on a row of logits that takes memory of its own.
_COSTLIEST = SamplingParams(temperature=1.0, top_p=0.9, frequency_penalty=0.1, logprobs=1, seed=0)


def largest_step(limits: StepLimits, speculative_tokens: int = 0, embeds: bool = False) -> StepPlan:
    """As many tokens and sequences as there may be, and a draw at the end of each; with LoRA, all in slots.

    All blocks are number 0, so a cache of one block is enough: what is computed means nothing.
    """
    each = min(1 + speculative_tokens, limits.max_batched_tokens, limits.max_model_len)
    counts = [each] * max(min(limits.max_running, limits.max_batched_tokens // each), 1)
    left = limits.max_batched_tokens - sum(counts)
    for index in reversed(range(len(counts))):
        more = min(left, limits.max_model_len - counts[index])
        counts[index] += more
        left -= more
    return StepPlan(tuple(_sequence(-1 - index, count, each, limits, embeds) for index, count in enumerate(counts)))


def _sequence(request_id: int, count: int, draws: int, limits: StepLimits, embeds: bool) -> ScheduledSequence:
    start = max(min(_CONTEXT, limits.max_model_len) - count, 0)
    end, tokens = start + count, [0] * (start + count)
    known = end - draws + 1  # what comes after them are guesses
    return ScheduledSequence(
        request_id,
        start,
        (0,) * count,
        (0,) * -(-end // limits.block_size),
        ()
        if embeds
        else tuple(
            Draw(request_id, _COSTLIEST, position, history=History(tokens, known, 1, (0,) * (position - known)))
            for position in range(known, end + 1)
        ),
        embeds=embeds,
        adapter=request_id % limits.adapter_slots if limits.adapter_slots else -1,
    )
