"""Steps whose only purpose is that a device compiles its kernels before the first request would wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

from tidewright.engine.plan import Draw, History, ScheduledSequence, StepPlan
from tidewright.schema import SamplingParams

_MOST_TOKENS = 128  # of one sequence; more take no other kernels
# Every part of sampling, and every combination of parts that is another kernel.
_ASKED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "presence_penalty": 1.0, "top_p": 0.9},
    {"temperature": 0.0, "logprobs": 1, "logit_bias": {0: 1.0}, "allowed_token_ids": [0]},
)


def warm_up_plans(max_tokens: int, block_size: int, embeds: bool, has_adapters: bool = False) -> Iterator[StepPlan]:
    """One request after the other, with prompts of up to `max_tokens`. The last of them has not ended.

    `has_adapters`: they have the LoRA adapter of the first slot, which may be empty: beside it all kernels are needed.
    """
    counts = [1 << bit for bit in range(_MOST_TOKENS.bit_length()) if 1 << bit <= max_tokens]
    steps = max(len(counts), len(_ASKED))
    ended: tuple[int, ...] = ()
    for number, (count, asked) in enumerate(islice(zip(cycle(counts), cycle(_ASKED), strict=False), steps)):
        request_id = -1 - number  # as no real one has
        token_ids, blocks = (0,) * count, tuple(range(-(-count // block_size)))
        history = History(token_ids, count, count)
        draws = () if embeds else (Draw(request_id, SamplingParams(seed=0, **asked), count, history=history),)
        adapter = 0 if has_adapters else -1
        sequence = ScheduledSequence(request_id, 0, token_ids, blocks, draws, embeds=embeds, adapter=adapter)
        yield StepPlan((sequence,), ended)
        ended = (request_id,)
