"""API keys: which are accepted, what they bring, and what a check of one costs."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fastapi import APIRouter, Request
from starlette.responses import Response

from helpers.api_keys import add, refusal, running, until_logged
from tidewright_gateway.auth import Authenticator, keys, require_admin
from tidewright_gateway.auth.callers import ANONYMOUS, Caller, Limits, Role
from tidewright_gateway.auth.keys import make_key, split_key
from tidewright_gateway.auth.stores import FileStore, open_store
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.context import RequestContext
from tidewright_gateway.http.fast_path import FastPath
from tidewright_gateway.http.query import QueryCheck
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.tracing.context import Tracer

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


def test_disabled_and_expired_keys_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_no_secret_fits_an_unknown_id_or_another_hash() -> None:
    (key, text), (_, other_text) = make_key("x"), make_key("x")
    secret = split_key(key)[1]
    assert text == f"sha256:{hashlib.sha256(secret.encode()).hexdigest()}"
    assert keys.fits(secret, (text,))
    assert keys.fits(secret, (other_text, text))
    assert not keys.fits(secret, ())
    assert not keys.fits(secret, (other_text,))


def test_a_key_of_an_older_version_is_refused_by_name_and_the_others_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FileStore(tmp_path / "keys.yaml")
    old, new = add(store, "old"), add(store, "new")
    store.change("old", lambda entry: msgspec.structs.replace(entry, hashes=("$argon2id$v=19$m=8192,t=1,p=1$YQ$YQ",)))

    async def main() -> None:
        async with running(store.name) as ask:
            assert (await ask(new)).key_id == "new"
            assert (await refusal(ask(old))).status == 401
            assert caplog.text.count("`tidewright keys rotate old`") == 1

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
            await until_logged(caplog, "keeping the previously loaded")
            for text in (wrong[:-1], f"{wrong}=", wrong.replace("alice", "bob")):
                shown.append(str(await refusal(ask(text))))

    asyncio.run(main())
    for secret in (key[-43:], wrong[-43:]):
        assert secret[:20] not in caplog.text + "".join(shown)


def test_nobody_without_a_key_has_a_body_read(tmp_path: Path) -> None:
    router = APIRouter()

    @router.post("/v1/completions")
    async def endpoint(request: Request) -> Response:
        return Response(await request.body())

    async def receive() -> dict[str, Any]:
        raise AssertionError("it is read")

    async def main() -> None:
        add(FileStore(tmp_path / "keys.yaml"), "alice")
        authenticator = Authenticator(GatewaySettings(keys=str(tmp_path / "keys.yaml")))
        path = FastPath(router, router.routes, QueryCheck(ignores_unknown=False), authenticator)
        context = RequestContext("1", Tracer(0.0).begin(()), "Bearer tw-alice-wrong")
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
        with pytest.raises(ApiError) as refused:
            await path({**scope, "state": {"context": context}}, receive, receive)
        assert refused.value.status == 401

    asyncio.run(main())
