"""One request while the engine works on it: its tokens, how far they are computed, and its blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidewright.engine.messages import TokenLogprob
from tidewright.engine.prompt_lookup import PromptLookup
from tidewright.kv_cache.prefix_cache import HashChain
from tidewright.schema import SamplingParams


@dataclass(eq=False)
class Sequence:
    request_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    bad_words_ids: tuple[tuple[int, ...], ...] = ()

    token_ids: list[int] = field(init=False)  # the prompt and what was generated
    num_computed: int = field(init=False, default=0)  # tokens whose keys and values are in the cache
    block_table: list[int] = field(init=False, default_factory=list)
    num_registered: int = field(init=False, default=0)  # blocks that the prefix cache was told of
    cached_tokens: int = field(init=False, default=0)  # that the prefix cache had when the sequence first ran
    prompt_logprobs: list[list[TokenLogprob]] = field(init=False, default_factory=list)
    # Set when the scheduler takes it.
    order: tuple[int, int] = field(init=False, default=(0, 0))  # priority, then arrival
    stop_ids: frozenset[int] = field(init=False, default=frozenset())
    chain: HashChain = field(init=False)
    lookup: PromptLookup = field(init=False, default_factory=PromptLookup)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)
