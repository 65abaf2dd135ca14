"""API keys: what is let in, how fast a change counts, and what becomes of a broken store; with a real Redis."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helpers.redis import RunningRedis
from tidewright_gateway.auth import Authenticator, keyring, keys, require_admin
from tidewright_gateway.auth.keys import KeyEntry, make_key, split_key
from tidewright_gateway.auth.stores import REDIS_HASH, FileStore, KeyStore, open_store
from tidewright_gateway.callers import ANONYMOUS, Caller, Limits, Role
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.errors import ApiError


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RunningRedis]:
    server = RunningRedis()
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["file", "redis"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return str(tmp_path / "keys.yaml")
    server = request.getfixturevalue("redis_server")
    server.client.flushall()
    return server.url


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keyring.POLL_INTERVAL <= 0.5  # a change is to count within a second
    monkeypatch.setattr(keyring, "POLL_INTERVAL", 0.02)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The secrets that were held against hashes."""
    made = []

    def fits(secret: str, hashes: tuple[str, ...]) -> bool:
        made.append(secret)
        return keys.fits(secret, hashes)

    monkeypatch.setattr(keyring, "fits", fits)
    return made


def add(store: KeyStore, key_id: str, **values: Any) -> str:
    key, text = make_key(key_id)
    store.change(key_id, lambda _: KeyEntry(key_id, (text,), **values))
    return key


@asynccontextmanager
async def running(where: str) -> AsyncIterator[Callable[[str], Awaitable[Caller]]]:
    authenticator = Authenticator(GatewaySettings(keys=where))
    await authenticator.start()
    try:
        yield lambda key: authenticator.caller(f"Bearer {key}")
    finally:
        await authenticator.stop()


async def refusal(answer: Awaitable[Caller]) -> ApiError:
    with pytest.raises(ApiError) as refused:
        await answer
    return refused.value


async def until_refused(ask: Callable[[str], Awaitable[Caller]], key: str) -> ApiError:
    for _ in range(3000):
        try:
            await ask(key)
        except ApiError as error:
            return error
        await asyncio.sleep(0.01)
    raise AssertionError("it is taken still")


async def until_taken(ask: Callable[[str], Awaitable[Caller]], key: str) -> None:
    for _ in range(3000):
        try:
            await ask(key)
            return
        except ApiError:
            await asyncio.sleep(0.01)
    raise AssertionError("it is refused still")


async def until_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    for _ in range(3000):
        if text in caplog.text:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not logged: {text}")


def test_a_key_brings_what_its_entry_says(where: str) -> None:
    limits, user_limits = Limits(requests_per_second=2.5, tokens_per_day=10), Limits(concurrent=3)
    key = add(open_store(where), "a-b_c.d", role=Role.ADMIN, limits=limits, user_limits=user_limits, priority=-2)

    async def main() -> None:
        async with running(where) as ask:
            for _ in range(2):
                caller = await ask(key)
                assert caller == Caller("a-b_c.d", Role.ADMIN, limits, user_limits, -2)
        require_admin(caller)

    asyncio.run(main())


def test_without_keys_anybody_is_let_in() -> None:
    assert asyncio.run(Authenticator(GatewaySettings()).caller(None)) is ANONYMOUS
    require_admin(ANONYMOUS)


def test_others_than_admins_are_refused_as_such() -> None:
    with pytest.raises(ApiError, match="role admin") as refused:
        require_admin(Caller("a"))
    assert (refused.value.status, refused.value.code) == (403, "admin_required")


def test_whatever_is_no_good_key_is_a_401(tmp_path: Path) -> None:
    where = str(tmp_path / "keys.yaml")
    key = add(FileStore(Path(where)), "alice")
    add(FileStore(Path(where)), "bob")
    other = f"tw-bob-{split_key(key)[1]}"
    texts = [
        f"{key}x",
        key[:-1],
        key.upper(),
        other,
        f"tw-carol-{key[-43:]}",
        "tw-alice-",
        "tw-",
        "sk-x",
        "é",
        "\udce9",
        key * 200,
    ]
    headers = [None, "", "Bearer", "Bearer ", f"Basic {key}", key, f"Bearer{key}", f"Bearer {key} {key}"]

    async def main() -> None:
        async with running(where) as ask:
            await ask(f" {key} ")
            for text in texts:
                error = await refusal(ask(text))
                assert (error.status, error.code) == (401, "invalid_api_key")
                assert error.headers["WWW-Authenticate"] == "Bearer"
                assert key[-43:] not in str(error)
            authenticator = Authenticator(GatewaySettings(keys=where))
            for header in headers:
                assert (await refusal(authenticator.caller(header))).status == 401
            assert (await authenticator.caller(f"bEARER {key}")).key_id == "alice"

    asyncio.run(main())


def test_disabled_and_expired_keys_say_so_also_when_they_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, now = FileStore(tmp_path / "keys.yaml"), datetime.now(timezone.utc)
    soon = add(store, "soon", expires=now + timedelta(hours=1))
    over = add(store, "over", expires=now - timedelta(seconds=1))
    disabled = add(store, "disabled", disabled=True)

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return now + timedelta(hours=1)

    async def main() -> None:
        async with running(store.name) as ask:
            await ask(soon)
            assert "expired at" in str(await refusal(ask(over)))
            assert "disabled" in str(await refusal(ask(disabled)))
            monkeypatch.setattr(keys, "datetime", Later)
            assert "expired at" in str(await refusal(ask(soon)))

    asyncio.run(main())


def test_a_key_is_hashed_once_however_often_and_with_how_many_requests_it_comes(
    tmp_path: Path, checks: list[str]
) -> None:
    store = FileStore(tmp_path / "keys.yaml")
    right, wrong = add(store, "alice"), make_key("alice")[0]

    async def main() -> None:
        async with running(store.name) as ask:
            await asyncio.gather(*(ask(right) for _ in range(2 * keyring.MOST_WAITING)))
            await ask(right)
            await asyncio.gather(*(refusal(ask(wrong)) for _ in range(20)))
            await refusal(ask(wrong))

    asyncio.run(main())
    assert sorted(checks) == sorted([split_key(right)[1], split_key(wrong)[1]])


def test_an_unknown_id_costs_what_a_wrong_secret_does(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [make_key("x")[1] for _ in range(2)]
    verified = []

    class Hasher:
        def verify(self, text: str, secret: str) -> bool:
            verified.append(text)
            raise keys.VerificationError

    monkeypatch.setattr(keys, "_HASHER", Hasher())
    for hashes in ((), texts[:1], texts):
        verified.clear()
        assert not keys.fits("wrong", hashes)
        assert len(verified) == keys.MOST_HASHES


def test_no_secret_fits_an_unknown_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_NOBODYS", make_key("x")[1])
    monkeypatch.setattr(keys, "_fits", lambda secret, text: text == keys._NOBODYS)
    assert not keys.fits("anything", ())
    assert not keys.fits("anything", (make_key("y")[1],))


def test_a_flood_of_wrong_keys_stops_nobody_who_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "MOST_WAITING", 8)
    store = FileStore(tmp_path / "keys.yaml")
    key = add(store, "alice")
    gate = threading.Event()

    def fits(secret: str, hashes: tuple[str, ...]) -> bool:
        assert gate.wait(20)
        return False

    async def main() -> None:
        async with running(store.name) as ask:
            await ask(key)
            monkeypatch.setattr(keyring, "fits", fits)
            flood = [asyncio.ensure_future(refusal(ask(make_key("alice")[0]))) for _ in range(12)]
            await asyncio.sleep(0.05)
            assert (await ask(key)).key_id == "alice"  # while all of the others wait
            gate.set()
            errors = await asyncio.gather(*flood)
            assert [error.status for error in errors].count(401) == 8
            full = [error for error in errors if error.status == 503]
            assert len(full) == 4
            assert full[0].headers["Retry-After"] == "1"

    asyncio.run(main())


def test_wrong_keys_are_remembered_for_a_while_and_not_without_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks: list[str]
) -> None:
    monkeypatch.setattr(keyring, "MOST_WRONG", 3)
    store = FileStore(tmp_path / "keys.yaml")
    add(store, "alice")
    wrong = [make_key("alice")[0] for _ in range(5)]

    async def main() -> None:
        ring = keyring.Keyring(FileStore(tmp_path / "keys.yaml"))
        for key in wrong:
            await refusal(ring.caller(key))
        assert len(ring._wrong) == 3
        await refusal(ring.caller(wrong[4]))
        assert len(checks) == 5
        await refusal(ring.caller(wrong[0]))
        assert len(checks) == 6
        monkeypatch.setattr(keyring, "WRONG_REMEMBERED", -1)
        for _ in range(2):
            await refusal(ring.caller(wrong[1]))
        assert len(checks) == 8
        await ring.stop()

    asyncio.run(main())


def test_changes_count_without_a_restart(where: str, checks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "WRONG_REMEMBERED", 3600)
    store = open_store(where)
    old, other = add(store, "alice"), add(store, "other")

    async def main() -> None:
        async with running(where) as ask:
            assert [(await ask(key)).key_id for key in (old, other)] == ["alice", "other"]
            (new, text), (early, early_text) = make_key("alice"), make_key("early")
            await refusal(ask(early))  # what is remembered as wrong may be right later

            store.change("alice", lambda entry: msgspec.structs.replace(entry, hashes=(text, entry.hashes[0])))
            store.change("early", lambda _: KeyEntry("early", (early_text,)))
            await until_taken(ask, new)
            await until_taken(ask, early)
            assert (await ask(old)).key_id == "alice"  # both, while users change over

            store.change("alice", lambda entry: msgspec.structs.replace(entry, hashes=(text,), priority=7))
            await until_refused(ask, old)
            assert (await ask(new)).priority == 7

            store.change("alice", lambda _: None)
            assert "not known" in str(await until_refused(ask, new))
            await ask(other)
            assert checks.count(split_key(other)[1]) == 1  # it did not change, so it was not forgotten

    asyncio.run(main())


def test_a_key_that_is_revoked_while_it_is_checked_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path / "keys.yaml")
    key = add(store, "alice")

    async def main() -> None:
        ring = keyring.Keyring(FileStore(tmp_path / "keys.yaml"))

        def fits(secret: str, hashes: tuple[str, ...]) -> bool:
            ring._put({}, [])
            return bool(hashes)

        monkeypatch.setattr(keyring, "fits", fits)
        await refusal(ring.caller(key))
        await ring.stop()

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
            assert "are read from" not in caplog.text
            await ask(key)
            path.unlink()
            await until_logged(caplog, "there is no such file")
            await ask(key)
            path.write_text(good.replace("alice", "bob"))
            await until_refused(ask, key)
            await ask(key.replace("alice", "bob"))
            assert "are read from" in caplog.text

    asyncio.run(main())


def test_redis_may_go_and_come_back(caplog: pytest.LogCaptureFixture) -> None:
    server = RunningRedis()
    server.start()
    key = add(open_store(server.url), "alice")

    async def main() -> None:
        async with running(server.url) as ask:
            server.kill()
            await until_logged(caplog, "stay in force")
            await asyncio.sleep(0.1)  # several polls
            assert (await ask(key)).key_id == "alice"  # which it was not asked for before
            server.start()
            new = add(open_store(server.url), "bob")
            await until_taken(ask, new)
            assert "are read from" in caplog.text
        assert caplog.text.count("stay in force") <= 2  # the connection that broke, and the ones that were refused

    try:
        asyncio.run(main())
    finally:
        server.kill()


def test_a_broken_entry_in_redis_costs_only_its_own_key(
    redis_server: RunningRedis, caplog: pytest.LogCaptureFixture
) -> None:
    redis_server.client.flushall()
    store = open_store(redis_server.url)
    keys_of = {name: add(store, name) for name in ("good", "broken", "renamed")}
    redis_server.client.hset(REDIS_HASH, "broken", b'{"id": "broken", "hashes": ["\xff"]}')
    redis_server.client.hset(REDIS_HASH, "renamed", redis_server.client.hget(REDIS_HASH, "good"))

    async def main() -> None:
        async with running(redis_server.url) as ask:
            await ask(keys_of["good"])
            for name in ("broken", "renamed"):
                await refusal(ask(keys_of[name]))
                assert f"entry '{name}'" in caplog.text
            keys_of["broken"] = add(store, "broken2")
            await until_taken(ask, keys_of["broken"])

    asyncio.run(main())


def test_changes_at_the_same_time_are_all_kept(where: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: add(open_store(where), f"key{number}"), range(8)))
    entries, faults = open_store(where).read() or ({}, [])
    assert entries.keys() == {f"key{number}" for number in range(8)}
    assert not faults


def test_no_secret_is_logged_or_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "keys.yaml"
    key, wrong = add(FileStore(path), "alice"), make_key("alice")[0]
    shown = [path.read_text()]

    async def main() -> None:
        async with running(str(path)) as ask:
            shown.append(repr(await ask(key)))
            shown.extend(repr(getattr(error, "body", error)) for error in [await refusal(ask(wrong))])
            path.write_text("nonsense")
            await until_logged(caplog, "stay in force")
            for text in (wrong[:-1], f"{wrong}=", wrong.replace("alice", "bob")):
                shown.append(str(await refusal(ask(text))))

    asyncio.run(main())
    for secret in (key[-43:], wrong[-43:]):
        assert secret[:20] not in caplog.text + "".join(shown)
