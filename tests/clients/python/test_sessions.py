"""Sessions over a WebSocket: generations mixed, credits, cancelling, and breaks without a lost or doubled token."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from helpers.cutting_proxy import CuttingProxy
from helpers.websocket import ScriptedGateway
from tidewright_client import (
    AsyncClient,
    Client,
    ConnectionFailed,
    Event,
    Finish,
    Interrupted,
    InvalidRequest,
    RateLimited,
    Text,
    TimedOut,
    Unauthenticated,
    Unavailable,
    UnexpectedAnswer,
    UsageReport,
    requests,
)
from tidewright_client.sessions.core import SessionCore

TOKENS = 200


@pytest.fixture(scope="module")
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway(ws_resume_grace=3) as running:
        yield running


def text(tokens: int = TOKENS) -> str:
    """Of the script."""
    return "".join(f"{number} " for number in range(tokens))


@pytest.mark.parametrize(
    ("prompt", "ended_by", "limited_by"), [("late", "timeout", None), ("limited", None, "tokens_per_minute")]
)
def test_an_answer_says_what_ended_it_early(
    gateway: ScriptedGateway, prompt: str, ended_by: str | None, limited_by: str | None
) -> None:
    with Client(gateway.url, model="m") as client, client.session() as session:
        with session.stream_complete(prompt, max_tokens=2) as generation:
            assert list(generation)[-2] == Finish("length", ended_by, limited_by)
            answer = generation.answer()
    assert (answer.finish_reason, answer.ended_by, answer.limited_by) == ("length", ended_by, limited_by)


def by_threads(url: str, credits: int, count: int) -> list[list[Event]]:
    """Several generations over one session, each read in turn by an event."""
    found: list[list[Event]] = [[] for _ in range(count)]
    with Client(url, model="m") as client, client.session() as session:
        running = {number: session.stream_complete("x", max_tokens=TOKENS, credits=credits) for number in range(count)}
        while running:
            for number, generation in list(running.items()):
                event = next(generation, None)
                if event is None:
                    del running[number]
                    assert generation.answer().text == text()
                else:
                    found[number].append(event)
    return found


def by_tasks(url: str, credits: int, count: int) -> list[list[Event]]:
    async def run() -> list[list[Event]]:
        async with AsyncClient(url, model="m") as client, client.session() as session:

            async def one() -> list[Event]:
                generation = session.stream_complete("x", max_tokens=TOKENS, credits=credits)
                events = [event async for event in generation]
                assert generation.answer().text == text()
                return events

            return await asyncio.gather(*[one() for _ in range(count)])

    return asyncio.run(run())


both = pytest.mark.parametrize("caller", [by_threads, by_tasks])


@both
def test_generations_are_mixed_over_one_connection(gateway: ScriptedGateway, caller: Any) -> None:
    with CuttingProxy(gateway.url, []) as proxy:
        found = caller(proxy.url, 16, 5)
        assert proxy.connections == 1
    for events in found:
        assert "".join(event.text for event in events if isinstance(event, Text)) == text()
        assert events[-2] == Finish("length")
        assert isinstance(events[-1], UsageReport)
        assert events[-1].usage.completion_tokens == TOKENS


@both
@pytest.mark.parametrize("seed", range(6))
def test_breaks_lose_and_double_no_token(gateway: ScriptedGateway, caller: Any, seed: int) -> None:
    """Compared to the script, which an undisturbed session gives in the test before this."""
    chance = random.Random(seed)
    cuts = [int(chance.expovariate(1 / 1500)) + 1 for _ in range(chance.randrange(2, 7))]
    with CuttingProxy(gateway.url, cuts) as proxy:
        found = caller(proxy.url, chance.choice([1, 7, 64, 1000]), 3)
        assert proxy.broken >= 2
    for events in found:
        assert "".join(event.text for event in events if isinstance(event, Text)) == text()
        assert [event for event in events if isinstance(event, Finish)] == [Finish("length")]


def test_no_more_tokens_come_than_there_are_credits(gateway: ScriptedGateway) -> None:
    with Client(gateway.url, model="m") as client, client.session() as session:
        slow = session.stream_complete("x", max_tokens=1000, credits=10)
        assert next(slow) == Text("0 ")
        list(session.stream_complete("x", max_tokens=300))  # the connection goes on meanwhile
        state = slow._state
        assert state.received <= 11
        assert state.untaken <= 10
        for _ in slow:
            assert state.untaken <= 10
        assert slow.answer().text == text(1000)


def test_cancelling_ends_it_in_the_gateway(gateway: ScriptedGateway) -> None:
    with Client(gateway.url, model="m") as client, client.session() as session:
        generation = session.stream_complete("x")
        next(generation)
        gateway.wait(running=1)
        generation.cancel()
        events = list(generation)
        assert generation.answer().finish_reason == "cancelled"
        assert isinstance(events[-1], UsageReport)
        with pytest.raises(InvalidRequest, match="read once"):
            list(generation)
        gateway.wait(running=0)
        with session.stream_complete("x") as closed:
            next(closed)
        gateway.wait(running=0)
        dropped = session.stream_complete("x")
        next(dropped)
        del dropped
        gateway.wait(running=0)


def test_tasks_cancel_too(gateway: ScriptedGateway) -> None:
    async def run() -> None:
        async with AsyncClient(gateway.url, model="m") as client, client.session() as session:
            generation = session.stream_complete("x")
            await anext(generation)
            await generation.cancel()
            assert isinstance([event async for event in generation][-1], UsageReport)
            assert generation.answer().finish_reason == "cancelled"
            async with session.stream_complete("x") as closed:
                await anext(closed)
            dropped = session.stream_complete("x")
            await anext(dropped)
            del dropped
            await asyncio.to_thread(gateway.wait, running=0)
            await session.stream_complete("x").cancel()  # which comes after what it cancels
            assert [event async for event in session.stream_complete("x", max_tokens=3)]
            await asyncio.to_thread(gateway.wait, running=0)

    asyncio.run(run())


def test_closing_a_session_ends_all_of_it(gateway: ScriptedGateway) -> None:
    with Client(gateway.url, model="m") as client:
        with client.session() as session:
            generation = session.stream_complete("x")
            next(generation)
        with pytest.raises(Interrupted) as caught:
            list(generation)
        assert caught.value.partial is not None
        assert caught.value.partial.text.startswith("0 ")
        with pytest.raises(InvalidRequest, match="closed"):
            session.stream_complete("x")
    gateway.wait(running=0, connections=0)


def test_a_cancelled_generation_stays_so_over_a_break(gateway: ScriptedGateway) -> None:
    with CuttingProxy(gateway.url, []) as proxy:
        with Client(proxy.url, model="m") as client, client.session() as session:
            generation = session.stream_complete("x", credits=5)
            next(generation)
            proxy.cut()
            generation.cancel()
            events = list(generation)
            assert not any(isinstance(event, Finish) and event.reason != "cancelled" for event in events)
            gateway.wait(running=0)


def test_a_gateway_that_stays_away_interrupts_with_what_had_come(gateway: ScriptedGateway) -> None:
    with CuttingProxy(gateway.url, []) as proxy, Client(proxy.url, model="m") as client, client.session() as session:
        generation = session.stream_complete("x", credits=5)
        next(generation)
        session._core._grace = 0.3
        proxy.refuse()
        proxy.cut()
        with pytest.raises(Interrupted) as caught:
            list(generation)
        assert caught.value.partial is not None
        assert text().startswith(caught.value.partial.text)
        assert caught.value.partial.text
        assert "the connection broke in the answer, and there was no other for 0.3 s" in caught.value.message
        assert "before an answer" not in caught.value.message
        assert caught.value.message.endswith("ask again; partial has what came")


def test_what_the_gateway_no_longer_keeps_is_interrupted(gateway: ScriptedGateway) -> None:
    with CuttingProxy(gateway.url, []) as proxy, Client(proxy.url, model="m") as client, client.session() as session:
        generation = session.stream_complete("x", credits=5)
        next(generation)
        generation._state.resume_token = "of another gateway"
        proxy.cut()
        with pytest.raises(Interrupted, match="could not be resumed") as caught:
            list(generation)
        assert (caught.value.status, caught.value.code) == (404, "unknown_generation")


def test_errors_are_those_of_http(gateway: ScriptedGateway) -> None:
    with Client(gateway.url, model="m") as client, client.session() as session:
        with pytest.raises(RateLimited, match="too much") as limited:
            list(session.stream_complete("refused"))
        assert limited.value.retry_after == 2.5
        with pytest.raises(Unavailable) as failed:
            list(session.stream_complete("fails", max_tokens=5))
        assert failed.value.partial is not None
        assert failed.value.partial.text == text(5)
        with pytest.raises(InvalidRequest) as invalid:
            list(session.stream_complete("x", extra={"temperature": "hot"}))
        assert invalid.value.param == "temperature"
        with pytest.raises(InvalidRequest, match="tools"):
            session.stream_chat([], extra={"tools": []})
        assert len(list(session.stream_complete("x", max_tokens=5))) >= 3  # it goes on after all of them


def test_a_wrong_key_ends_the_session_s_generations(gateway: ScriptedGateway) -> None:
    with Client(gateway.url, model="m", key="wrong") as client, client.session() as session:
        for _ in range(2):
            with pytest.raises(Unauthenticated) as caught:
                list(session.stream_complete("x"))
            assert "wrong:" not in caught.value.message


def test_the_timeout_counts_here_as_well(gateway: ScriptedGateway) -> None:
    with Client(gateway.url, model="m") as client, client.session() as session:
        generation = session.stream_complete("x", timeout=0.3, extra={"timeout": 60})
        with pytest.raises(TimedOut) as caught:
            list(generation)
        assert caught.value.partial is not None
        gateway.wait(running=0)


def test_too_long_an_answer_is_cancelled(gateway: ScriptedGateway) -> None:
    with Client(gateway.url, model="m", max_answer_bytes=1000) as client, client.session() as session:
        with pytest.raises(UnexpectedAnswer, match="1000"):
            list(session.stream_complete("x"))
        gateway.wait(running=0)


def test_a_refused_handshake_says_when_to_try_again() -> None:
    class Refusing(BaseHTTPRequestHandler):
        protocol_version, asked = "HTTP/1.1", 0

        def do_GET(self) -> None:
            Refusing.asked += 1
            self.send_response(503)
            self.send_header("Retry-After", "100")
            self.send_header("Connection", "close")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with Client(url, model="m") as client, client.session() as session:
            with pytest.raises(Unavailable) as caught:  # nobody waits for so long
                list(session.stream_complete("x"))
        server.shutdown()
    assert (caught.value.retry_after, Refusing.asked) == (100.0, 1)


@pytest.mark.parametrize("was_open", [False, True])
def test_it_waits_for_as_long_as_it_is_told(was_open: bool) -> None:
    with Client("http://127.0.0.1:1", model="m") as client:
        core = SessionCore(client._settings)
    core._was_open = was_open
    for retry_after, expected in ((7.0, 7.0), (100.0, None)):
        state = core.begin(requests.completion("x", {}, "m", False), 10)
        assert core.lost(None, Unavailable("busy", retry_after=retry_after)) == expected
        assert state.is_over == (expected is None)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://127.0.0.1:1"])
def test_without_a_gateway_it_says_what_to_check(url: str) -> None:
    with Client(url, model="m", max_retries=1) as client, client.session() as session:
        with pytest.raises(ConnectionFailed, match=r"host and port|connection"):
            list(session.stream_complete("x"))


def test_a_session_connects_again_when_it_is_needed_again(gateway: ScriptedGateway) -> None:
    with CuttingProxy(gateway.url, []) as proxy, Client(proxy.url, model="m") as client, client.session() as session:
        list(session.stream_complete("x", max_tokens=3))
        proxy.cut()
        deadline = time.monotonic() + 30
        while session._connection is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert session._core.lost(None, ConnectionFailed("it broke")) is None  # nothing runs, so none is made
        generation = session.stream_complete("x", max_tokens=3)
        list(generation)
        assert generation.answer().text == text(3)
        assert proxy.connections == 2
