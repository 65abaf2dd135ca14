"""Whole generations, kept to be given again: what is the same for the same caller, and how long it stays.

Only what would come out the same is kept: greedy or with the caller's seed, and ended by the model or by max_tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from cachetools import TTLCache

from tidewright.schema import SamplingParams
from tidewright_gateway.auth.callers import Caller
from tidewright_gateway.cache.single_flight import Flight
from tidewright_gateway.replicas.triton import Reply

T = TypeVar("T")

PIECE = 16  # tokens of one reply from the cache: few replies for a whole answer, and a stream for who asked for one
_WHOLE = ("stop", "length")
# Bytes beside what sys.getsizeof tells of texts and lists (measured; a test holds the sum to what Python takes).
_ENTRY_BYTES, _REPLY_BYTES, _TOKEN_BYTES = 400, 150, 32


class CacheState(Enum):
    """What became of a generation; the values are those of X-Cache."""

    HIT = "HIT"
    SHARED = "SHARED"
    """Another request runs it, or ran it when this one came."""
    MISS = "MISS"
    BYPASS = "BYPASS"


class CachePolicy(Enum):
    """What the caller wants of the cache."""

    USE = "use"
    REFRESH = "refresh"
    """Run it again, and keep what comes."""
    AVOID = "avoid"

    @classmethod
    def of(cls, cache_control: str | None) -> CachePolicy:
        """Of a request's Cache-Control: no-store, no-cache or max-age=0. Others have no meaning here (RFC 9111)."""
        words = {word.strip().lower() for word in (cache_control or "").split(",")}
        if "no-store" in words:
            return cls.AVOID
        return cls.REFRESH if words & {"no-cache", "max-age=0"} else cls.USE


class Replies(Protocol):
    """To be closed, also when nothing was read of it."""

    def __aiter__(self) -> AsyncIterator[Reply]: ...

    async def aclose(self) -> None: ...


def is_repeatable(sampling: SamplingParams) -> bool:
    """They ask, as the caller sent them, for an answer that would be the same again."""
    # With a timeout the load decides where it ends.
    return (sampling.temperature == 0 or sampling.seed is not None) and sampling.timeout is None


def cache_key(caller: Caller, model: str, prompt: Sequence[int], sampling: SamplingParams, logprobs: bool) -> bytes:
    """Of all that changes the answer, and of the caller's key, as nobody may learn what others asked for."""
    same: dict[str, Any] = {"timeout": None, "priority": 0, "tenant": "", "tenant_weight": 1}
    same |= {"ttft_target": None, "tpot_target": None}
    if sampling.temperature == 0:
        same["seed"] = None
    if sampling.logit_bias:
        same["logit_bias"] = dict(sorted(sampling.logit_bias.items()))
    if sampling.allowed_token_ids:
        same["allowed_token_ids"] = sorted(sampling.allowed_token_ids)
    # Not all objects are sorted: a JSON schema says by its order in what order the answer has its fields.
    head = msgspec.json.encode((caller.key_id, model, logprobs, msgspec.structs.replace(sampling, **same)))
    return hashlib.blake2b(head + array("i", prompt).tobytes(), digest_size=32).digest()


class ResponseCache:
    """Least recently used first out, and none older than `ttl` seconds. Belongs to one event loop."""

    def __init__(self, max_bytes: int, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_bytes`: 0 switches it off, and with it the sharing of runs."""
        self._entries = _Entries(max_bytes, ttl, clock, lambda entry: entry.size)
        self._flights: dict[tuple[bytes, float | None], Flight[Reply]] = {}
        self.counts = dict.fromkeys(CacheState, 0)

    @property
    def num_bytes(self) -> int:
        return int(self._entries.currsize)

    @property
    def evictions(self) -> int:
        """Entries that made room for others, before their time was over."""
        return self._entries.evictions

    def open(
        self,
        key: bytes | None,
        run: Callable[[], AsyncGenerator[Reply, None]],
        policy: CachePolicy = CachePolicy.USE,
        keep: Callable[[], bool] = lambda: True,
        ttft_target: float | None = None,
    ) -> tuple[CacheState, Replies]:
        """The replies of `run`, or of one like it.

        Args:
            key: None if the generation can't be repeated.
            run: called at once for MISS and BYPASS; runs in a task of its own in case of MISS.
            keep: asked when it ended whole: false if the answer is worse than what the caller asked for.
            ttft_target: only a run with the same one is joined: it may be refused for its own.
        """
        state, replies = self._open(key, run, policy, keep, ttft_target)
        self.counts[state] += 1
        return state, replies

    def _open(
        self,
        key: bytes | None,
        run: Callable[[], AsyncGenerator[Reply, None]],
        policy: CachePolicy,
        keep: Callable[[], bool],
        ttft_target: float | None,
    ) -> tuple[CacheState, Replies]:
        if key is None or policy is CachePolicy.AVOID or not self._entries.maxsize:
            return CacheState.BYPASS, run()
        if policy is CachePolicy.USE:
            if entry := self._entries.get(key):
                return CacheState.HIT, _replay(entry.replies)
            if (running := self._flights.get((key, ttft_target))) and running.is_open:
                return CacheState.SHARED, running.join()
        # Whoever comes now joins this one; one that it replaces goes on for its own, and is not kept.
        flight = self._flights[key, ttft_target] = Flight(run, partial(self._ended, (key, ttft_target), keep))
        return CacheState.MISS, flight.join()

    def _ended(self, name: tuple[bytes, float | None], keep: Callable[[], bool], flight: Flight[Reply]) -> None:
        if self._flights.get(name) is not flight:
            return
        del self._flights[name]
        replies = flight.items
        # By its last reply: who has that one may leave before the run has ended.
        if replies and replies[-1].finish_reason in _WHOLE and keep():
            entry = _Entry.of(replies)
            if entry.size <= self._entries.maxsize:
                self._entries[name[0]] = entry


@dataclass(frozen=True)
class _Entry:
    replies: tuple[Reply, ...]
    size: int  # bytes

    @classmethod
    def of(cls, replies: Sequence[Reply]) -> _Entry:
        joined = tuple(join(replies))
        return cls(joined, _ENTRY_BYTES + sum(map(_size, joined)))


class _Entries(TTLCache[bytes, _Entry]):
    evictions = 0

    def popitem(self) -> tuple[bytes, _Entry]:
        self.evictions += 1
        return super().popitem()


async def _replay(replies: Sequence[Reply]) -> AsyncGenerator[Reply, None]:
    for number, reply in enumerate(replies):
        if number:
            await asyncio.sleep(0)  # a long answer must not hold up others
        yield reply


def join(replies: Sequence[Reply]) -> list[Reply]:
    """The same in fewer replies: as many together as have PIECE tokens at most. None is split."""
    groups: list[list[Reply]] = []
    room = 0
    for reply in replies:
        if not groups or len(reply.token_ids) > room:
            groups.append([])
            room = PIECE
        groups[-1].append(reply)
        room -= len(reply.token_ids)
    return [_joined(group) for group in groups]


def _joined(replies: Sequence[Reply]) -> Reply:
    logprobs = [reply.logprobs for reply in replies if reply.logprobs]
    positions = [position for part in logprobs for position in msgspec.json.decode(part, type=list[msgspec.Raw])]
    return Reply(
        text="".join(reply.text for reply in replies),
        token_ids=[token_id for reply in replies for token_id in reply.token_ids],
        finish_reason=replies[-1].finish_reason,
        logprobs=msgspec.json.encode(positions) if logprobs else None,
        prompt_logprobs=_only(reply.prompt_logprobs for reply in replies),
        stop_reason=replies[-1].stop_reason,
        num_cached_tokens=_only(reply.num_cached_tokens for reply in replies),
    )


def _only(values: Iterable[T | None]) -> T | None:
    """The value that one reply has, at most."""
    return next((value for value in values if value is not None), None)


def _size(reply: Reply) -> int:
    """Bytes."""
    parts = (reply.text, reply.token_ids, reply.logprobs, reply.prompt_logprobs, reply.stop_reason)
    return _REPLY_BYTES + sum(map(sys.getsizeof, filter(None, parts))) + _TOKEN_BYTES * len(reply.token_ids)
