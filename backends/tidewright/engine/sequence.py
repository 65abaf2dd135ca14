"""One request while the engine works on it: its tokens, how far they are computed, and its blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidewright.schema import SamplingParams


@dataclass(eq=False)
class Sequence:
    request_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams

    token_ids: list[int] = field(init=False)  # the prompt and what was generated
    num_computed: int = field(init=False, default=0)  # tokens whose keys and values are in the cache
    block_table: list[int] = field(init=False, default_factory=list)
    in_flight: bool = field(init=False, default=False)  # part of a plan that is not yet committed
    cancelled: bool = field(init=False, default=False)
    stop_ids: frozenset[int] = field(init=False, default=frozenset())  # set when the scheduler takes it

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)
