"""API keys: which are accepted, what they bring, and what a check of one costs."""

from __future__ import annotations

import asyncio
import logging
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from helpers.api_keys import add, refusal, running, until_logged
from tidewright_gateway.auth import Authenticator, keyring, keys, require_admin
from tidewright_gateway.auth.callers import ANONYMOUS, Caller, Limits, Role
from tidewright_gateway.auth.keys import make_key, split_key
from tidewright_gateway.auth.stores import FileStore, open_store
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import ApiError

pytestmark = pytest.mark.usefixtures("quick_polls")


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
