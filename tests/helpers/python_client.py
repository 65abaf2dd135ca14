"""Plays a vector's call with the sync client and with the async one, and tells what the caller got."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from helpers.conformance import Played
from tidewright_client import (
    Answer,
    AsyncClient,
    Client,
    Event,
    Finish,
    Text,
    TidewrightError,
    ToolCall,
)


def sync_caller(base_url: str, vector: dict[str, Any]) -> Played:
    """The last of its calls, which all go the same way."""
    act, last = vector.get("act", {}), Played([], {}, None)
    with Client(base_url, model="scripted", **vector.get("client", {})) as client:
        for _ in range(act.get("repeat", 1)):
            events: list[Event] = []
            answer = Answer()
            try:
                name, arguments, options = _call_of(vector)
                if vector["stream"]:
                    with getattr(client, f"stream_{name}")(*arguments, **options) as stream:
                        for event in stream:
                            events.append(event)
                            if len(events) == act.get("pause_after_events"):
                                time.sleep(act["seconds"])
                            if _ends(act, events):
                                break
                    answer = stream.answer()
                else:
                    answer = getattr(client, name)(*arguments, **options)
                last = Played(_events(events), _fields(answer), None)
            except TidewrightError as error:
                last = _failed(events, error)
    return last


def async_caller(base_url: str, vector: dict[str, Any]) -> Played:
    return asyncio.run(_async_caller(base_url, vector))


async def _async_caller(base_url: str, vector: dict[str, Any]) -> Played:
    act, last = vector.get("act", {}), Played([], {}, None)
    async with AsyncClient(base_url, model="scripted", **vector.get("client", {})) as client:
        for _ in range(act.get("repeat", 1)):
            events: list[Event] = []
            answer = Answer()
            try:
                name, arguments, options = _call_of(vector)
                if vector["stream"]:
                    async with getattr(client, f"stream_{name}")(*arguments, **options) as stream:
                        async for event in stream:
                            events.append(event)
                            if len(events) == act.get("pause_after_events"):
                                await asyncio.sleep(act["seconds"])
                            if _ends(act, events):
                                break
                    answer = stream.answer()
                else:
                    answer = await getattr(client, name)(*arguments, **options)
                last = Played(_events(events), _fields(answer), None)
            except TidewrightError as error:
                last = _failed(events, error)
    return last


CALLERS: dict[str, Callable[[str, dict[str, Any]], Played]] = {"sync": sync_caller, "async": async_caller}


def _call_of(vector: dict[str, Any]) -> tuple[str, list[Any], dict[str, Any]]:
    options = dict(vector["request"])
    arguments = [options.pop(name) for name in ("messages", "prompt") if name in options]
    return vector["api"], arguments, options


def _ends(act: dict[str, Any], events: list[Event]) -> bool:
    return len(events) == act.get("cancel_after_events") or (
        act.get("then") == "cancel" and len(events) == act["pause_after_events"]
    )


def _events(events: list[Event]) -> list[list[Any]]:
    made: list[list[Any]] = []
    for event in events:
        if isinstance(event, Text):
            made.append(["text", event.text])
        elif isinstance(event, ToolCall):
            made.append(["tool_call", event.index, event.id or None, event.name or None, event.arguments])
        elif isinstance(event, Finish):
            made.append(["finish", event.reason])
        else:
            made.append(["usage"])
    return made


def _fields(answer: Answer | list[str]) -> dict[str, Any]:
    if isinstance(answer, list):  # of models
        return {"text": " ".join(answer)}
    fields = dataclasses.asdict(answer)
    calls = [{name: one[name] for name in ("id", "name", "arguments")} for one in fields["tool_calls"]]
    return {**fields, "tool_calls": calls}


def _failed(events: list[Event], error: TidewrightError) -> Played:
    fields = {
        name: getattr(error, name) for name in ("message", "status", "code", "param", "request_id", "retry_after")
    }
    partial = error.partial or Answer()
    return Played(
        _events(events), _fields(partial), {**fields, "type": type(error).__name__, "partial_text": partial.text}
    )


def session_failures(url: str, **options: Any) -> list[TidewrightError]:
    """What a generation of a session ends with, sync and async."""
    options = {"model": "m", "max_retries": 0, **options}

    async def in_a_loop() -> None:
        async with AsyncClient(url, **options) as client, client.session() as session:
            async for _ in session.stream_complete("x"):
                pass

    def in_a_thread() -> None:
        with Client(url, **options) as client, client.session() as session:
            list(session.stream_complete("x"))

    found = []
    for play in (in_a_thread, lambda: asyncio.run(in_a_loop())):
        try:
            play()
        except TidewrightError as error:
            found.append(error)
    assert len(found) == 2, "it did not fail"
    return found
