"""Stores of API keys, an authenticator that reads one, and waits for what it notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tidewright_gateway.auth import Authenticator
from tidewright_gateway.auth.callers import Caller
from tidewright_gateway.auth.keys import KeyEntry, make_key
from tidewright_gateway.auth.stores import KeyStore
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import ApiError


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
