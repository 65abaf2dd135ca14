"""What the gateway keeps of generations: for whom, how long, and how much."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cached import BYPASS, HIT, MISS, SHARED, Source, answer, ask, content, read
from tidewright.schema import SamplingParams
from tidewright_gateway.auth.callers import ANONYMOUS, Caller
from tidewright_gateway.cache.responses import PIECE, CachePolicy, ResponseCache, _Entry, cache_key, is_repeatable, join
from tidewright_gateway.replicas.triton import Reply

OTHER = {
    "temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.1,
    "frequency_penalty": 0.1, "logit_bias": {5: 1.0}, "bad_words": ["a"], "guided_json": {"type": "object"},
    "guided_regex": "a", "guided_grammar": "a", "guided_choice": ["a"], "seed": 6, "max_tokens": 17, "min_tokens": 1,
    "stop": "a", "stop_token_ids": [3], "ignore_eos": True, "logprobs": 1, "prompt_logprobs": 1, "n": 2,
    "cache_salt": "a", "priority": 1, "timeout": 9.0, "ttft_target": 1.0, "tpot_target": 0.1,
    "include_stop_str_in_output": True, "skip_special_tokens": False,
    "allowed_token_ids": [3], "lora_name": "a", "tenant": "a", "tenant_weight": 2,
}  # fmt: skip


def test_what_ended_whole_is_given_again_in_few_replies() -> None:
    async def main() -> None:
        cache, source = ResponseCache(2**20, 60), Source(answer(100, "stop"))
        assert await ask(cache, source) is MISS
        state, replies = cache.open(b"k", source.run)
        again = await read(replies)
        assert (state, content(again)) == (HIT, content(source.replies))
        assert [len(reply.token_ids) for reply in again] == [PIECE] * 6 + [4]
        assert (source.begun, source.running) == (1, 0)
        assert cache.counts == {HIT: 1, SHARED: 0, MISS: 1, BYPASS: 0}

    asyncio.run(main())


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=30))
def test_joined_replies_say_the_same_and_none_is_split(shapes: list[tuple[int, bool]]) -> None:
    """Each has so many tokens, with log-probabilities or, as of no token, without."""
    replies = [
        Reply("x" * size, [7] * size, None, b"[" + b",".join([b'{"7": 0.5}'] * size) + b"]" if size or has else None)
        for size, has in shapes
    ]
    joined = join(replies)
    assert content(joined) == content(replies)
    sizes = [len(reply.token_ids) for reply in joined]
    assert all(size <= PIECE or size in {size for size, _ in shapes} for size in sizes)
    assert all(one + other > PIECE for one, other in pairwise(sizes) if other)


def test_what_comes_once_is_kept() -> None:
    async def main() -> None:
        first = Reply("a", [1], None, None, prompt_logprobs=b"[null]", num_cached_tokens=0)
        last = Reply("b", [2], "stop", None, stop_reason="END")
        for replies in ([first, *answer(40)[:-1], last], [replace(last, prompt_logprobs=b"[]", num_cached_tokens=16)]):
            cache, source = ResponseCache(2**20, 60), Source(replies)
            await ask(cache, source)
            again = await read(cache.open(b"k", source.run)[1])
            for name in ("prompt_logprobs", "num_cached_tokens", "stop_reason"):
                told = [getattr(reply, name) for reply in again]
                at = len(again) - 1 if name == "stop_reason" else 0
                assert told.pop(at) == getattr(replies[-1 if name == "stop_reason" else 0], name), name
                assert set(told) <= {None}, name

    asyncio.run(main())


@pytest.mark.parametrize("finish_reason", ["timeout", "cancelled", "overloaded"])
def test_what_did_not_end_by_itself_is_not_kept(finish_reason: str) -> None:
    async def main() -> None:
        cache, source = ResponseCache(2**20, 60), Source(answer(3, finish_reason))
        assert [await ask(cache, source), await ask(cache, source)] == [MISS, MISS]

    asyncio.run(main())


def test_nor_what_ended_without_a_last_reply_or_is_worse_than_what_was_asked_for() -> None:
    async def main() -> None:
        cache = ResponseCache(2**20, 60)
        cut = Source(answer(3)[:2])
        assert [await ask(cache, cut), await ask(cache, cut)] == [MISS, MISS]
        source = Source(answer(3))
        assert [await ask(cache, source, keep=lambda: False), await ask(cache, source)] == [MISS, MISS]
        assert await ask(cache, source) is HIT

    asyncio.run(main())


def test_who_leaves_at_the_last_reply_has_had_all_of_it() -> None:
    async def main() -> None:
        cache, source = ResponseCache(2**20, 60), Source(answer(3))
        _, replies = cache.open(b"k", source.run)
        async with aclosing(replies):
            async for reply in replies:
                if reply.finish_reason:
                    break
        assert source.running == 0
        assert await ask(cache, source) is HIT

    asyncio.run(main())


def test_it_is_kept_for_its_time() -> None:
    async def main() -> None:
        now = 0.0
        cache, source = ResponseCache(2**20, 60, lambda: now), Source(answer(3))
        assert await ask(cache, source) is MISS
        now = 59.9
        assert await ask(cache, source) is HIT  # which does not make it younger
        now = 60.0
        assert cache.num_bytes == 0
        assert await ask(cache, source) is MISS

    asyncio.run(main())


def test_the_caller_says_whether_to_read_and_to_keep() -> None:
    async def main() -> None:
        cache, source = ResponseCache(2**20, 60), Source(answer(3))
        assert await ask(cache, source, policy=CachePolicy.AVOID) is BYPASS
        assert await ask(cache, source, policy=CachePolicy.REFRESH) is MISS
        assert await ask(cache, source) is HIT
        assert await ask(cache, source, policy=CachePolicy.AVOID) is BYPASS
        newer = Source(answer(4))
        assert await ask(cache, newer, policy=CachePolicy.REFRESH) is MISS
        assert await ask(cache, newer) is HIT
        assert (await read(cache.open(None, source.run)[1])) == source.replies
        off = ResponseCache(0, 60)
        assert [await ask(off, source), await ask(off, source)] == [BYPASS, BYPASS]

    asyncio.run(main())


def test_a_refresh_joins_no_run_that_began_before_and_what_that_one_says_is_not_kept() -> None:
    async def main() -> None:
        cache, old, new = ResponseCache(2**20, 60), Source(answer(9)), Source(answer(2))
        _, replies = cache.open(b"k", old.run)
        reading = asyncio.ensure_future(read(replies))
        await asyncio.sleep(0)
        assert await ask(cache, new, policy=CachePolicy.REFRESH) is MISS
        assert content(await reading) == content(old.replies)
        assert await ask(cache, new) is HIT

    asyncio.run(main())


def test_a_run_that_its_ttft_target_may_end_is_joined_by_nobody_with_another() -> None:
    async def main() -> None:
        cache, impatient, patient = ResponseCache(2**20, 60), Source([]), Source(answer(9))
        impatient.error = RuntimeError("its first token would come too late")
        _, refused = cache.open(b"k", impatient.run, ttft_target=0.1)
        assert cache.open(b"k", impatient.run, ttft_target=0.1)[0] is SHARED
        assert await ask(cache, patient) is MISS
        with pytest.raises(RuntimeError, match="too late"):
            await read(refused)
        assert await ask(cache, patient, ttft_target=0.1) is HIT  # an answer is the same with any

    asyncio.run(main())


@pytest.mark.parametrize(
    ("header", "policy"),
    [
        (None, CachePolicy.USE),
        ("", CachePolicy.USE),
        ("max-age=10, no-transform", CachePolicy.USE),
        ("No-Cache", CachePolicy.REFRESH),
        (" max-age=0 ,no-transform", CachePolicy.REFRESH),
        ("no-cache, no-store", CachePolicy.AVOID),
        ("no-store", CachePolicy.AVOID),
    ],
)
def test_cache_control(header: str | None, policy: CachePolicy) -> None:
    assert CachePolicy.of(header) is policy


def test_its_key_has_all_that_changes_the_answer() -> None:
    def key(
        caller: Caller = ANONYMOUS, model: str = "m", prompt: Sequence[int] = (1, 2), logprobs: bool = False, **own: Any
    ) -> bytes:
        return cache_key(caller, model, prompt, SamplingParams(**{"seed": 5, **own}), logprobs)

    assert set(OTHER) == set(SamplingParams.__struct_fields__)  # a new one belongs in one of the two groups here
    same = {"priority", "timeout", "ttft_target", "tpot_target", "tenant", "tenant_weight"}
    different = [key(**{name: value}) for name, value in OTHER.items() if name not in same]
    different += [key(), key(model="mm"), key(prompt=[1, 3]), key(prompt=[1]), key(logprobs=True)]
    different.append(key(Caller("another")))
    assert len(set(different)) == len(different)
    assert {key(**{name: OTHER[name]}) for name in same} == {key()}

    assert key(temperature=0, seed=1) == key(temperature=0, seed=None)
    assert key(logit_bias={1: 1.0, 2: 2.0}) == key(logit_bias={2: 2.0, 1: 1.0})
    assert key(allowed_token_ids=[1, 2]) == key(allowed_token_ids=[2, 1]) != key(allowed_token_ids=[1, 3])
    # The answer has its fields in the schema's order.
    fields = ({"a": {}, "b": {}}, {"b": {}, "a": {}})
    assert len({key(guided_json={"type": "object", "properties": own}) for own in fields}) == 2


def test_what_can_be_repeated() -> None:
    assert is_repeatable(SamplingParams(temperature=0))
    assert is_repeatable(SamplingParams(seed=0))
    assert not is_repeatable(SamplingParams())
    assert not is_repeatable(SamplingParams(temperature=0, timeout=1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1500, 6000), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=40))
def test_never_more_than_max_bytes_and_the_least_recently_used_goes_first(
    max_bytes: int, asked: list[tuple[int, int]]
) -> None:
    """Each asks for a name; if that is not there, it is an answer of so many tokens."""

    async def main() -> None:
        cache, model = ResponseCache(max_bytes, 60, lambda: 0.0), OrderedDict[int, int]()
        evictions = 0
        for name, length in asked:
            state, replies = cache.open(bytes([name]), Source(answer(length)).run)
            await read(replies)
            assert state is (HIT if name in model else MISS)
            size = _Entry.of(answer(length)).size
            if name in model:
                model.move_to_end(name)
            elif size <= max_bytes:
                while sum(model.values()) + size > max_bytes:
                    model.popitem(last=False)
                    evictions += 1
                model[name] = size
            assert cache.num_bytes == sum(model.values()) <= max_bytes
        assert cache.evictions == evictions

    asyncio.run(main())


@pytest.mark.parametrize(("length", "size"), [(1, 1), (8, 4), (500, 4), (30, 2000)])
def test_bytes_are_those_that_python_takes(length: int, size: int) -> None:
    async def main() -> None:
        cache, number = ResponseCache(2**30, 60), max(1000 // length, 20)

        async def add(name: int) -> None:
            replies = [Reply(one.text, [10_000 + name], one.finish_reason, None) for one in answer(length, size=size)]
            # Copies, as of each generation.
            replies[0] = replace(replies[0], prompt_logprobs=b"%d" % name * 500)
            replies[-1] = replace(replies[-1], stop_reason=f"{name}" * 20)
            await read(cache.open(b"%32d" % name, Source(replies).run)[1])

        await add(-1)
        tracemalloc.start()
        try:
            before, counted = tracemalloc.get_traced_memory()[0], cache.num_bytes
            for name in range(number):
                await add(name)
            taken = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert 0.9 < (cache.num_bytes - counted) / taken < 1.2

    asyncio.run(main())
