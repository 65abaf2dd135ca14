"""API keys: how fast a change counts, and what becomes of a store that breaks; with a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from redis.client import Pipeline

from helpers.api_keys import add, refusal, running, until_logged, until_refused, until_taken
from helpers.redis import RunningRedis
from tidewright_gateway.auth import Authenticator, AuthSetupError, redis_keys
from tidewright_gateway.auth.keyring import Keyring
from tidewright_gateway.auth.keys import KeyEntry, make_key
from tidewright_gateway.auth.redis_keys import REDIS_HASH
from tidewright_gateway.auth.stores import FileStore, open_store
from tidewright_gateway.config import GatewaySettings

pytestmark = pytest.mark.usefixtures("quick_polls")


def test_changes_count_without_a_restart(where: str) -> None:
    store = open_store(where)
    old, other = add(store, "alice"), add(store, "other")

    async def main() -> None:
        async with running(where) as ask:
            assert [(await ask(key)).key_id for key in (old, other)] == ["alice", "other"]
            (new, text), (early, early_text) = make_key("alice"), make_key("early")
            await refusal(ask(early))  # what is wrong now may be right later

            store.change("alice", lambda entry: msgspec.structs.replace(entry, hashes=(text, entry.hashes[0])))
            store.change("early", lambda _: KeyEntry("early", (early_text,)))
            await until_taken(ask, new)
            await until_taken(ask, early)
            assert (await ask(old)).key_id == "alice"  # both, while users change over

            store.change("alice", lambda entry: msgspec.structs.replace(entry, hashes=(text,), priority=7))
            await until_refused(ask, old)
            assert (await ask(new)).priority == 7

            store.change("alice", lambda _: None)
            assert "invalid API key" in str(await until_refused(ask, new))
            await ask(other)

    asyncio.run(main())


def test_a_file_that_breaks_later_leaves_the_keys_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    key = add(FileStore(path), "alice")
    good = path.read_text()

    async def main() -> None:
        async with running(str(path)) as ask:
            path.write_text(good + "  rolle: use\n")
            await until_logged(caplog, "unknown field `rolle`")
            await asyncio.sleep(0.1)  # several polls
            assert caplog.text.count("unknown field `rolle`") == 1
            assert "are loaded from" not in caplog.text
            await ask(key)
            path.unlink()
            await until_logged(caplog, "there is no such file")
            await ask(key)
            path.write_text(good.replace("alice", "bob"))
            await until_refused(ask, key)
            await ask(key.replace("alice", "bob"))
            assert "are loaded from" in caplog.text

    asyncio.run(main())


def test_redis_may_go_and_come_back(caplog: pytest.LogCaptureFixture) -> None:
    server = RunningRedis()
    server.start()
    key = add(open_store(server.url), "alice")

    async def main() -> None:
        async with running(server.url) as ask:
            server.kill()
            await until_logged(caplog, "keeping the previously loaded")
            await asyncio.sleep(0.1)  # several polls
            assert (await ask(key)).key_id == "alice"  # which it was not asked for before
            server.start()
            new = add(open_store(server.url), "bob")
            await until_taken(ask, new)
            assert "are loaded from" in caplog.text
        assert (
            caplog.text.count("keeping the previously loaded") <= 2
        )  # the connection that broke, and the ones that were refused

    try:
        asyncio.run(main())
    finally:
        server.kill()


def test_a_redis_that_comes_back_empty_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with RunningRedis() as server:
        add(open_store(server.url), "alice")
        settings = GatewaySettings(keys=server.url)

        async def main() -> None:
            authenticator = Authenticator(settings)
            await authenticator.start()
            try:
                assert not authenticator.has_no_keys
                server.kill()
                await until_logged(caplog, "keeping the previously loaded")
                assert not authenticator.has_no_keys
                server.start()
                await until_logged(caplog, "has no keys, so every API key is refused")
                assert authenticator.has_no_keys
                assert server.url in authenticator.trouble
                add(open_store(server.url), "bob")
                await until_logged(caplog, "has keys again")
                assert not authenticator.trouble
            finally:
                await authenticator.stop()

        asyncio.run(main())
    assert caplog.text.count("so every API key is refused") == 1


@pytest.mark.parametrize("has_tokens", [False, True])
def test_a_store_that_never_had_keys_is_no_trouble_beside_tokens(tmp_path: Path, has_tokens: bool) -> None:
    (tmp_path / "keys.yaml").write_text("keys: []\n")
    assert Keyring(open_store(str(tmp_path / "keys.yaml")), is_alone=not has_tokens).is_empty != has_tokens


def test_a_broken_entry_in_redis_costs_only_its_own_key(redis: RunningRedis, caplog: pytest.LogCaptureFixture) -> None:
    redis.client.flushall()
    store = open_store(redis.url)
    keys_of = {name: add(store, name) for name in ("good", "broken", "renamed")}
    redis.client.hset(REDIS_HASH, "broken", b'{"id": "broken", "hashes": ["\xff"]}')
    redis.client.hset(REDIS_HASH, "renamed", redis.client.hget(REDIS_HASH, "good"))

    async def main() -> None:
        async with running(redis.url) as ask:
            await ask(keys_of["good"])
            for name in ("broken", "renamed"):
                await refusal(ask(keys_of[name]))
                assert f"entry '{name}'" in caplog.text
            keys_of["broken"] = add(store, "broken2")
            await until_taken(ask, keys_of["broken"])

    asyncio.run(main())


def num_reads(server: RunningRedis) -> int:
    return int(server.client.info("commandstats").get("cmdstat_hgetall", {"calls": 0})["calls"])


def test_keys_in_redis_are_read_again_only_after_a_change(redis: RunningRedis) -> None:
    redis.client.flushall()
    reader, writer = open_store(redis.url), open_store(redis.url)
    add(writer, "alice")
    assert reader.read() is not None
    before = num_reads(redis)
    for _ in range(5):
        assert reader.read() is None
    assert num_reads(redis) == before
    # Whoever changes it, and however.
    copy = redis.client.hget(REDIS_HASH, "alice")
    assert isinstance(copy, bytes)
    changes: list[tuple[Callable[[], object], set[str]]] = [
        (lambda: add(writer, "bob"), {"alice", "bob"}),
        (lambda: redis.client.hdel(REDIS_HASH, "bob"), {"alice"}),
        (lambda: redis.client.hset(REDIS_HASH, "carl", copy.replace(b"alice", b"carl")), {"alice", "carl"}),
        (lambda: redis.client.rename(REDIS_HASH, "elsewhere"), set()),
        (lambda: redis.client.rename("elsewhere", REDIS_HASH), {"alice", "carl"}),
        (redis.client.flushall, set()),
        (lambda: redis.client.hset(REDIS_HASH, "alice", copy), {"alice"}),
        (lambda: redis.client.client_kill_filter(_type="normal", skipme=True), {"alice"}),  # the connections that watch
        (lambda: redis.client.pexpire(REDIS_HASH, 1), set()),
    ]
    seen = {"alice"}
    for change, expected in changes:
        change()
        deadline = time.monotonic() + 30
        while seen != expected:
            assert time.monotonic() < deadline, (seen, expected)
            if found := reader.read():
                seen = set(found[0])
        assert reader.read() is None


@pytest.mark.parametrize(
    ("step", "has_changed"),
    [
        *((step, has_changed) for step in ("watch", "multi", "execute") for has_changed in (True, False)),
        ("hgetall", True),
    ],
)
@pytest.mark.parametrize("is_before", [True, False])
def test_no_change_falls_between_two_reads_of_redis(
    redis: RunningRedis, monkeypatch: pytest.MonkeyPatch, step: str, has_changed: bool, is_before: bool
) -> None:
    """`has_changed`: before the first of them, too."""
    redis.client.flushall()
    reader = open_store(redis.url)
    for name in ("alice", "bob"):
        add(open_store(redis.url), name)
    reader.read()
    if has_changed:
        redis.client.hdel(REDIS_HASH, "bob")
    done = getattr(Pipeline, step)
    seen = {"alice", "bob"}

    def with_a_change(pipe: Pipeline, *args: object) -> object:
        monkeypatch.setattr(Pipeline, step, done)
        if is_before:
            redis.client.hdel(REDIS_HASH, "alice")
        try:
            return done(pipe, *args)
        finally:
            if not is_before:
                redis.client.hdel(REDIS_HASH, "alice")

    monkeypatch.setattr(Pipeline, step, with_a_change)
    for _ in range(2):
        if found := reader.read():
            seen = set(found[0])
    assert getattr(Pipeline, step) is done
    assert seen == (set() if has_changed else {"bob"})


@pytest.mark.parametrize("step", ["watch", "execute", "hgetall"])
def test_a_redis_that_hangs_in_a_read_costs_a_connection_no_longer_than_that(
    redis: RunningRedis, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(redis_keys, "_REDIS_TIMEOUT", 0.2)
    redis.client.flushall()
    reader = open_store(redis.url)
    assert isinstance(reader, redis_keys.RedisStore)
    add(open_store(redis.url), "alice")
    reader.read()
    if step == "hgetall":
        add(open_store(redis.url), "bob")
    done = getattr(Pipeline, step)

    def hanging(pipe: Pipeline, *args: object) -> object:
        redis.freeze()
        return done(pipe, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, step, hanging)
        try:
            with pytest.raises(AuthSetupError, match=f"{redis.url}.*: "):
                reader.read()
        finally:
            redis.thaw()
    reader.read()
    assert reader.read() is None
    assert len(reader._redis.connection_pool._in_use_connections) == 1  # the one that watches


def test_changes_at_the_same_time_are_all_kept(where: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: add(open_store(where), f"key{number}"), range(8)))
    entries, faults = open_store(where).read() or ({}, [])
    assert entries.keys() == {f"key{number}" for number in range(8)}
    assert not faults
