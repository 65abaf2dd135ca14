"""Where responses are stored: how long, how many, for whom, and a Redis that is gone or full."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pydantic import ValidationError

from helpers.redis import RunningRedis
from tidewright_gateway.auth.callers import Caller
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.responses import redis_store
from tidewright_gateway.openai.responses.api import ResponsesApi
from tidewright_gateway.openai.responses.items import RESPONSE as PREFIX
from tidewright_gateway.openai.responses.redis_store import RedisStore
from tidewright_gateway.openai.responses.request import ResponsesRequest
from tidewright_gateway.openai.responses.shelf import Shelf
from tidewright_gateway.openai.responses.store import MemoryStore, NoStore, ResponseStore, StoredResponse, make_store
from tidewright_gateway.tracing.context import Tracer

ID, OTHER = (f"{PREFIX}_{digit * 48}" for digit in "ab")  # not random: pytest-xdist compares the names of cases


def stored(text: str = "x") -> StoredResponse:
    return StoredResponse({"id": ID, "output": [{"text": text}], "status": "completed"}, [{"id": "msg_1"}])


def shelf_of(store: ResponseStore) -> Shelf:
    return Shelf(store, 10_000)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def with_redis(url: str, body: Callable[[RedisStore], Awaitable[Any]], ttl: float = 60) -> Any:
    async def run() -> Any:
        store = RedisStore(url, ttl)
        watching = asyncio.create_task(store.watch())
        try:
            return await body(store)
        finally:
            watching.cancel()
            await store.close()

    return asyncio.run(run())


async def belongs_to_its_key(store: ResponseStore) -> None:
    await store.put("a", ID, stored())
    await store.put("b", OTHER, stored("of b"))
    assert await store.get("a", ID) == stored()
    assert await store.get("b", ID) is None
    assert await store.get("a", OTHER) is None
    assert not await store.delete("b", ID)
    assert await store.delete("a", ID)
    assert await store.get("a", ID) is None
    assert not await store.delete("a", ID)
    assert (await store.get("b", OTHER)) == stored("of b")


def test_a_response_in_memory_belongs_to_its_key() -> None:
    asyncio.run(belongs_to_its_key(MemoryStore(1 << 20, 60)))


def test_a_response_in_redis_belongs_to_its_key(redis: RunningRedis) -> None:
    redis.client.flushall()
    with_redis(redis.url, belongs_to_its_key)


def test_memory_forgets_what_is_old_and_what_was_used_least_recently() -> None:
    async def run() -> None:
        clock = Clock()
        store = MemoryStore(5000, 10, clock)
        ids = [f"{PREFIX}_{digit * 48}" for digit in "123"]
        for id in ids[:2]:
            await store.put("a", id, stored("x" * 1500))
        await store.get("a", ids[0])
        await store.put("a", ids[2], stored("x" * 1500))
        assert [await store.get("a", id) is not None for id in ids] == [True, False, True]
        await store.put("a", ids[1], stored("x" * 5000))  # longer than all there is
        assert [await store.get("a", id) is not None for id in ids] == [True, False, True]
        clock.now = 10.0
        assert [await store.get("a", id) for id in ids] == [None] * 3

    asyncio.run(run())


def test_redis_forgets_what_is_old_and_gateways_share_it(redis: RunningRedis) -> None:
    redis.client.flushall()
    with_redis(redis.url, lambda store: store.put("a", ID, stored()), ttl=30)
    assert with_redis(redis.url, lambda store: store.get("a", ID)) == stored()
    (name,) = redis.client.keys("*")  # type: ignore[misc]
    assert 0 < redis.client.pttl(name) <= 30_000  # type: ignore[operator]


def test_what_is_no_stored_response_is_none(redis: RunningRedis, caplog: pytest.LogCaptureFixture) -> None:
    redis.client.set(f"{redis_store.PREFIX}{ID}:a", b"{")
    assert with_redis(redis.url, lambda store: store.get("a", ID)) is None
    assert "can't be read" in caplog.text


def test_redis_goes_and_comes_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(redis_store, "TICK", 0.02)

    async def scenario(store: RedisStore) -> None:
        shelf = shelf_of(store)
        await shelf.keep("a", ID, stored())
        redis.kill()
        await shelf.keep("a", OTHER, stored())  # the answer is given all the same
        assert "is not stored" in caplog.text
        assert "gone" in store.trouble
        for ask in (shelf.previous, shelf.response, shelf.delete):
            with pytest.raises(ApiError) as refused:
                await ask("a", ID)
            assert (refused.value.status, refused.value.code) == (503, "responses_unavailable")
        redis.start()
        for _ in range(1000):
            if not store.trouble:
                break
            await asyncio.sleep(0.02)
        await shelf.keep("a", ID, stored())
        assert (await shelf.previous("a", ID)) == stored()

    with RunningRedis() as redis:
        with_redis(redis.url, scenario)


def test_a_full_redis_can_still_be_read(redis: RunningRedis) -> None:
    async def scenario(store: RedisStore) -> None:
        shelf = shelf_of(store)
        await shelf.keep("a", ID, stored())
        redis.client.config_set("maxmemory", 1)
        try:
            await shelf.keep("a", OTHER, stored())
            assert "can't do its work" in store.trouble
            assert (await shelf.previous("a", ID)) == stored()
        finally:
            redis.client.config_set("maxmemory", 0)
        await shelf.keep("a", OTHER, stored())
        assert not store.trouble

    redis.client.flushall()
    with_redis(redis.url, scenario)


@pytest.mark.parametrize("id", ["", "resp_1", f"{ID}:a", ID.upper(), "x" * 10_000])
def test_what_can_be_no_id_is_not_looked_up(id: str) -> None:
    class Strict(MemoryStore):
        async def get(self, key_id: str, response_id: str) -> StoredResponse | None:
            raise AssertionError(response_id)

    with pytest.raises(ApiError) as refused:
        asyncio.run(shelf_of(Strict(1000, 1)).response("a", id))
    assert refused.value.status == 404
    assert len(str(refused.value)) < 250


def test_what_is_not_there_is_told_with_the_reason() -> None:
    shelf = shelf_of(MemoryStore(1 << 20, 60))
    with pytest.raises(ApiError, match="expired") as refused:
        asyncio.run(shelf.previous("a", ID))
    assert (refused.value.status, refused.value.code, refused.value.param) == (
        400,
        "previous_response_not_found",
        "previous_response_id",
    )
    for store, reason in ((NoStore("only in Redis"), "only in Redis"),):
        with pytest.raises(ApiError, match=reason):
            asyncio.run(shelf_of(store).previous("a", ID))
        with pytest.raises(ApiError, match=reason):
            asyncio.run(shelf_of(store).response("a", ID))


def test_a_conversation_may_be_as_long_as_a_body() -> None:
    async def run() -> None:
        shelf = shelf_of(MemoryStore(1 << 20, 60))
        await shelf.keep("a", ID, stored("x" * 9000))
        await shelf.keep("a", OTHER, stored("x" * 10_000))
        assert await shelf.previous("a", ID)
        with pytest.raises(ApiError, match=r"more than 10000 \(max_body\)"):
            await shelf.previous("a", OTHER)
        assert await shelf.response("a", OTHER)

    asyncio.run(run())


def test_the_settings_name_the_store() -> None:
    assert isinstance(make_store(GatewaySettings(), 1), MemoryStore)
    assert "response_store" in make_store(GatewaySettings(), 2).why_not
    assert "response_store_bytes" in make_store(GatewaySettings(response_store_bytes=0), 1).why_not
    assert isinstance(make_store(GatewaySettings(response_store="redis://127.0.0.1:1/0"), 2), RedisStore)
    with pytest.raises(ValidationError, match="redis://HOST:PORT/DB"):
        GatewaySettings(response_store="memory")


def test_what_a_gateway_of_another_version_has_stored_is_told_as_such() -> None:
    newer = {"type": "message", "role": "user", "content": [], "of_a_later_version": 1}

    async def run() -> None:
        shelf = Shelf(MemoryStore(1 << 20, 60), 1 << 20)
        response = {"output": [{**newer, "id": f"msg_{ID.rpartition('_')[2]}0000"}]}
        await shelf.store.put("a", ID, StoredResponse(response, [newer]))
        context = RequestContext("1", Tracer(0.0).begin(()))
        context.caller = Caller("a")
        item = {"type": "item_reference", "id": response["output"][0]["id"]}
        for fields in ({"previous_response_id": ID}, {"input": [item]}):
            body = ResponsesRequest.model_validate({"model": "m", "input": "Hi", **fields})
            with pytest.raises(ApiError, match="another version of the gateway") as told:
                await ResponsesApi(shelf).translate(context, body)
            assert told.value.status == 400

    asyncio.run(run())
