"""The limits of a scheduler, and the refusal of requests that it could never finish."""

from __future__ import annotations

from dataclasses import dataclass

from tidewright.engine.sequence import Sequence
from tidewright.kv_cache.budget import blocks_of
from tidewright.schema import FinishReason, SamplingParams


@dataclass(frozen=True)
class SchedulerConfig:
    block_size: int
    max_batched_tokens: int
    max_running: int
    max_waiting: int
    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    prefix_caching: bool = True
    speculative_tokens: int = 0
    embeds: bool = False  # requests end after their prompt, with its embedding
    cache_format: str = ""  # of the numbers in the KV cache
    adapter_slots: int = 0  # LoRA adapters that sequences of one step may use

    @property
    def least_blocks(self) -> int:
        """The longest request that may be accepted fits into so many alone."""
        return blocks_of(self.max_model_len, self.block_size)


QUEUE_SHARE = 3  # times the places that are free: a tenant alone fills three quarters of the queue


class RequestRefusedError(ValueError):
    """The request can't be taken; the message says what to change."""

    def __init__(self, message: str, reason: FinishReason = "invalid") -> None:
        super().__init__(message)
        self.reason: FinishReason = reason


def longest(sequence: Sequence, config: SchedulerConfig) -> int:
    """Tokens of prompt and output, at most."""
    if config.embeds:
        return len(sequence.prompt_token_ids)
    return min(len(sequence.prompt_token_ids) + sequence.sampling.max_tokens, config.max_model_len)


def stop_ids(sampling: SamplingParams, config: SchedulerConfig) -> frozenset[int]:
    """Tokens that end an output."""
    ids = sampling.stop_token_ids if sampling.ignore_eos else [*sampling.stop_token_ids, *config.eos_ids]
    # A client may name ids that this vocabulary lacks: they never come, and can't be masked.
    return frozenset(token for token in ids if token < config.vocab_size)


def check_request(sequence: Sequence, config: SchedulerConfig, num_blocks: int) -> None:
    """Raises RequestRefusedError, unless it could run alone in a KV cache of `num_blocks`."""
    prompt = sequence.prompt_token_ids
    if not prompt:
        raise RequestRefusedError("the prompt has no tokens")
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise RequestRefusedError(f"the prompt has token ids outside of 0 … {config.vocab_size - 1}")
    if len(prompt) + (not config.embeds) > config.max_model_len:
        what = "a prompt is" if config.embeds else "prompt and output together are"
        raise RequestRefusedError(f"the prompt has {len(prompt)} tokens, but {what} limited to {config.max_model_len}")
    # The last token of an output is only sent, never computed.
    needed, room = longest(sequence, config) - (not config.embeds), num_blocks * config.block_size
    if needed > room:
        raise RequestRefusedError(
            f"prompt and max_tokens may need {needed} tokens of KV cache, but it holds {room}; "
            f"lower max_tokens or shorten the prompt"
        )


def check_share(tenant: str, config: SchedulerConfig, requests: int, own: int) -> None:
    """Raises RequestRefusedError: of all `requests`, the tenant has `own`, and too few places are left for others.

    The bound shrinks with the places that are left (dynamic thresholds, Choudhury and Hahne 1998): several floods leave
    some as well. Requests without a tenant may have the whole queue.
    """
    free = config.max_running + config.max_waiting - requests
    if tenant and own - config.max_running >= QUEUE_SHARE * free:
        raise RequestRefusedError(
            f"{own} requests of this tenant run or wait already, which is its share of the queue; try again later",
            "overloaded",
        )
