"""One connection's rules, over real sockets and before a scripted backend: order, callers, timeouts, bad frames."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode

from helpers.websocket import ScriptedGateway, StreamClient, fruitless, text_of
from tidewright_gateway.auth.callers import ANONYMOUS
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.replicas.triton import Reply
from tidewright_gateway.websocket import session
from tidewright_gateway.websocket.messages import Done, Token
from tidewright_gateway.websocket.resumable import ResumableStream
from tidewright_gateway.websocket.server import BEFORE_OPEN

MIB = 2**20
ENDLESS = {"model": "m", "prompt": "a"}


@pytest.fixture(scope="module")
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway(ws_max_generations=3, max_body=20_000) as running:
        yield running


@pytest.fixture
def client(gateway: ScriptedGateway) -> Iterator[StreamClient]:
    with StreamClient(gateway.url) as running:
        yield running
    gateway.wait(connections=0)


def test_generations_run_beside_each_other_and_each_ends_once(gateway: ScriptedGateway, client: StreamClient) -> None:
    assert client.opened["max_generations"] == 3
    client.start("endless", **ENDLESS)
    client.send("generate", id="b", request={**ENDLESS, "max_tokens": 300})
    client.send("generate", id="c", request={**ENDLESS, "max_tokens": 5, "prompt": "fails"})
    messages, done = client.rest(2)
    own = [message for message in messages if message["id"] == "b" and message["type"] == "token"]
    assert text_of(own) == "".join(f"{number} " for number in range(300))
    ends = {message["id"]: message for message in done}
    assert ends["b"]["choices"] == [{"index": 0, "seq": 300, "finish_reason": "length"}]
    assert ends["b"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 300, "total_tokens": 303}
    assert ends["b"]["served_by"] == "script"
    assert ends["c"]["error"]["status"] == 500
    assert ends["c"]["choices"] == [{"index": 0, "seq": 5, "finish_reason": None}]
    client.send("cancel", id="endless")
    _, (cancelled,) = client.rest()
    assert cancelled["choices"][0]["finish_reason"] == "cancelled"
    gateway.wait(running=0)


def test_what_ended_an_answer_early_is_said_as_over_http(client: StreamClient) -> None:
    for prompt, ended_by, limited_by in (("late", "timeout", None), ("limited", None, "tokens_per_minute")):
        client.start("a", model="m", prompt=prompt, max_tokens=2)
        _, (done,) = client.rest()
        (choice,) = done["choices"]
        assert (choice["finish_reason"], choice.get("ended_by")) == ("length", ended_by)
        assert done.get("limited_by") == limited_by


def test_credit_is_never_exceeded_and_what_waits_comes_joined(gateway: ScriptedGateway, client: StreamClient) -> None:
    client.start("a", credits=3, model="m", prompt="a", max_tokens=40)
    got = client.tokens(3)
    gateway.wait(running=0)  # all 40 are written
    for count in (1, 10):
        client.send("credit", id="a", tokens=count)
        (joined,) = client.tokens(count)
        assert len(joined["token_ids"]) == count
        got.append(joined)
        client.send("ping")
        client.receive("pong")  # and nothing else
    client.send("credit", id="a", tokens=1000)
    (rest,), (done,) = client.rest()
    assert text_of([*got, rest]) == "".join(f"{number} " for number in range(40))
    assert rest["seq"] == done["choices"][0]["seq"] == 40


def test_the_connection_s_credits_are_those_of_its_generations(gateway: ScriptedGateway) -> None:
    with StreamClient(gateway.url, opens=False) as client:
        client.send("open", credits=2)
        client.receive("opened")
        client.send("generate", id="a", request={**ENDLESS, "max_tokens": 9})
        client.receive("started")
        assert client.tokens(2)[-1]["seq"] == 2
        client.start("b", credits=None, **ENDLESS, max_tokens=9)
        assert [message["id"] for message in client.rest()[1]] == ["b"]


def test_a_cancelled_generation_leaves_what_waits_for_credit(client: StreamClient) -> None:
    client.start("a", credits=1, model="m", prompt="a", max_tokens=40)
    client.tokens(1)
    client.send("cancel", id="a")
    tokens, (done,) = client.rest()
    assert tokens == []
    assert fruitless_id(client, "a") == "unknown_id"
    assert done["usage"]["completion_tokens"] == done["choices"][0]["seq"] >= 1


def test_a_cancelled_generation_sends_nothing_more_even_with_credit() -> None:
    async def ends() -> tuple[object, object]:
        generation = ResumableStream(ANONYMOUS, None)
        for number in range(2):
            generation.outbox.put(0, Reply("a", [number], None, None))
        first = generation.next_message()
        generation.outbox.put(0, Reply("b", [2], "length", None))
        generation.cancel()
        generation.is_running = False
        return first, generation.next_message()

    first, last = asyncio.run(ends())
    assert isinstance(first, Token)
    assert isinstance(last, Done)


def fruitless_id(client: StreamClient, id: str) -> str:
    client.send("cancel", id=id)
    return client.receive("error")["code"]


@pytest.mark.parametrize(
    ("frame", "code", "said"),
    [
        ("{", "invalid_json", "not JSON"),
        ('{"type": "generate", "request": ' + "[" * 10_000, "invalid_json", "not JSON"),
        ("[]", "invalid_value", "one of open, generate"),
        ("7", "invalid_value", "one of open, generate"),
        ('{"id": "a"}', "invalid_value", "type must be one of"),
        ('{"type": "opened"}', "invalid_value", "type must be one of"),
        ('{"type": {}}', "invalid_value", "type must be one of"),
        ('{"type": "open"}', "already_open", "open already"),
        ('{"type": "ping", "x": 1}', "invalid_value", "unknown field `x`"),
        ('{"type": "generate", "id": "a"}', "invalid_value", "missing required field `request`"),
        ('{"type": "generate", "id": "", "request": {}}', "invalid_value", "length >= 1"),
        ('{"type": "generate", "id": "a", "request": []}', "invalid_value", "must be an object"),
        ('{"type": "generate", "id": "a", "request": {}}', "invalid_value", "messages, for a chat, or prompt"),
        ('{"type": "generate", "id": "a", "credits": -1, "request": {}}', "invalid_value", ">= 0"),
        ('{"type": "credit", "id": "a", "tokens": 5}', "unknown_id", "no generation 'a'"),
        ('{"type": "credit", "id": "a", "tokens": 0}', "invalid_value", ">= 1"),
        ('{"type": "cancel", "id": "a"}', "unknown_id", "no generation 'a'"),
        ('{"type": "resume", "id": "a", "resume_token": "x"}', "unknown_generation", "resume_token"),
        (b'{"type": "ping"}', "binary", "text frames"),
    ],
)
def test_what_is_wrong_with_a_message_is_said_and_the_connection_goes_on(
    client: StreamClient, frame: str | bytes, code: str, said: str
) -> None:
    client.connection.send(frame)
    error = client.receive("error")
    assert (error["code"], said in error["message"]) == (code, True), error
    assert 400 <= error["status"] < 500
    if '"id": "a"' in str(frame) and "type" in str(frame):
        assert error["id"] == "a"
    client.send("ping")
    client.receive("pong")


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"prompt": "a"}, "invalid_value"),
        ({**ENDLESS, "tools": 1}, "unknown_parameter"),
        ({**ENDLESS, "prompt": [1, 1.5]}, "invalid_value"),
    ],
)
def test_what_is_wrong_with_a_request_is_its_end(client: StreamClient, request_: dict, code: str) -> None:
    client.send("generate", id="a", request=request_)
    client.receive("started")
    _, (done,) = client.rest()
    assert (done["error"]["status"], done["error"]["code"]) == (400, code)
    assert [choice["seq"] for choice in done["choices"]] == [0]


def test_a_key_that_is_revoked_begins_and_resumes_nothing_more(gateway: ScriptedGateway) -> None:
    with StreamClient(gateway.url, token="lost") as client:
        client.start("a", credits=0, **ENDLESS)
        gateway.backend.revoked.add("lost")
        client.send("generate", id="b", request=ENDLESS)
        client.receive("started")
        _, (done,) = client.rest()
        assert (done["id"], done["error"]["status"]) == ("b", 401)
        client.send("resume", id="c", resume_token=client.resume_tokens["a"])
        assert client.receive("error")["status"] == 401
        client.send("cancel", id="a")
        client.rest()


def test_a_client_that_takes_nothing_does_not_make_the_gateway_grow() -> None:
    with ScriptedGateway(ws_unsent_bytes=100_000) as gateway, StreamClient(gateway.url) as client:
        client.start("a", credits=0, **{**ENDLESS, "prompt": "big"})
        client.start("b", credits=0, **ENDLESS, max_tokens=1)
        gateway.wait(running=0)
        client.send("credit", id="b", tokens=9)
        client.send("credit", id="a", tokens=10_000)
        _, done = client.rest(2)
        ends = {message["id"]: message for message in done}
        assert (ends["a"]["error"]["status"], ends["a"]["error"]["code"]) == (429, "not_taken")
        assert "error" not in ends["b"]


def test_all_generations_together_are_bounded() -> None:
    with ScriptedGateway(ws_live_bytes=200_000) as gateway, StreamClient(gateway.url) as client:
        client.start("small", credits=0, **ENDLESS, max_tokens=3)
        client.start("big", **{**ENDLESS, "prompt": "big"})
        _, (done,) = client.rest()
        assert (done["id"], done["error"]["code"]) == ("big", "not_taken")


def test_a_request_may_be_nested_as_deep_as_a_message_is_read() -> None:
    nested = b'{"prompt": "a", "n": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    with pytest.raises(ApiError, match="too many objects or lists within each other"):
        session._look_at(nested)


@pytest.mark.parametrize("more", [{}, {"max_tokens": 40}])
def test_the_largest_of_all_is_told_its_end_although_it_has_no_credit(more: dict) -> None:
    with ScriptedGateway(ws_live_bytes=200_000) as gateway, StreamClient(gateway.url) as client:
        client.start("big", credits=0, **{**ENDLESS, "prompt": "big"}, **more)
        tokens, (done,) = client.rest()
        assert (tokens, done["id"], done["error"]["code"]) == ([], "big", "not_taken")
        assert done["choices"][0]["seq"] > 0
        assert fruitless(gateway.url, client.resume_tokens["big"])["code"] == "unknown_generation"
        client.start("big", **ENDLESS, max_tokens=1)  # its id and its place are free
        client.rest()


def test_pings_do_not_keep_a_connection_that_was_never_opened(
    gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ping_on(client: StreamClient) -> None:
        for _ in range(1000):
            client.send("ping")
            client.receive("pong")
            time.sleep(0.005)

    monkeypatch.setattr(session, "OPEN_TIMEOUT", 0.3)
    with StreamClient(gateway.url, opens=False) as client, pytest.raises(ConnectionClosed, match="no open within"):
        ping_on(client)


def test_who_cancels_before_the_first_token_is_told_of_each_choice(client: StreamClient) -> None:
    client.send("generate", id="a", request={**ENDLESS, "n": 2})
    client.send("cancel", id="a")
    client.receive("started")
    _, (done,) = client.rest()
    assert [choice["index"] for choice in done["choices"]][:1] == [0]
    assert {choice["finish_reason"] for choice in done["choices"]} == {"cancelled"}


@pytest.mark.parametrize("origin", ["http://evil.example", "http://[", "null"])
def test_pages_of_other_hosts_are_refused_however_they_name_theirs(gateway: ScriptedGateway, origin: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        StreamClient(gateway.url, origin=origin)
    assert refused.value.response.status_code == 403
    assert b"cross_site" in refused.value.response.body


def test_before_open_no_more_is_read_than_of_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has no key can't have the gateway keep a message of max_body bytes."""
    frame = Frame(Opcode.TEXT, b"x" * (64 * MIB)).serialize(mask=True)
    options = {"max_body": 64 * MIB, "ws_send_timeout": 0.5}
    with ScriptedGateway(**options) as gateway, StreamClient(gateway.url, opens=False) as client:
        gateway.wait(connections=1)
        (protocol,) = gateway.server.server_state.connections
        client.connection.socket.settimeout(1)
        with pytest.raises(TimeoutError):  # the kernel keeps some MiB
            client.connection.socket.sendall(frame)
        assert len(protocol.conn.reader.buffer) <= BEFORE_OPEN
        assert 0 < len(protocol._held) <= MIB
        monkeypatch.setattr(session, "OPEN_TIMEOUT", 0.0)
        gateway.wait(sockets=0)


def test_what_follows_open_at_once_may_be_long() -> None:
    with ScriptedGateway(max_body=8 * MIB) as gateway, StreamClient(gateway.url, opens=False) as client:
        messages: list[dict[str, Any]] = [{"type": "ping"}] * 3 + [{"type": "open", "token": "a"}]
        request = {"model": "m", "prompt": "x" * (4 * MIB), "max_tokens": 2}
        messages += [{"type": "generate", "id": str(number), "request": request} for number in range(3)]
        frames = [Frame(Opcode.TEXT, json.dumps(one).encode()).serialize(mask=True) for one in messages]
        client.connection.socket.sendall(b"".join(frames))
        assert [client.receive()["type"] for _ in range(4)] == ["pong", "pong", "pong", "opened"]
        done: list[dict[str, Any]] = []
        while len(done) < 3:
            if (message := client.receive())["type"] == "done":
                done.append(message)
        assert sorted(one["id"] for one in done) == ["0", "1", "2"]
        assert not any("error" in one for one in done)


def test_before_open_nothing_goes_but_a_ping(gateway: ScriptedGateway) -> None:
    with StreamClient(gateway.url, opens=False) as client:
        client.send("ping")
        client.receive("pong")
        for message in (
            {"type": "generate", "request": ENDLESS},
            {"type": "resume", "resume_token": "x"},
            {"type": "cancel"},
        ):
            client.send(**message, id="a")
            assert client.receive("error")["code"] == "not_open"
        client.send("open", token="wrong")
        assert client.receive("error")["status"] == 401
        client.send("open", token="right")
        client.receive("opened")


def test_ids_and_the_number_of_generations_are_kept_apart(gateway: ScriptedGateway, client: StreamClient) -> None:
    client.start("a", credits=0, **ENDLESS)
    for id in ("b", "c"):
        client.start(id, credits=0, **ENDLESS)
    client.send("generate", id="a", request=ENDLESS)
    assert (error := client.receive("error"))["code"] == "duplicate_id"
    assert error["id"] == "a"
    client.send("generate", id="d", request=ENDLESS)
    assert client.receive("error")["code"] == "too_many_generations"
    client.send("cancel", id="a")
    client.rest()
    client.start("a", credits=None, **ENDLESS, max_tokens=1)  # the id is free again
    client.rest()
    client.send("generate", id="e", request={**ENDLESS, "prompt": "refused"})
    client.receive("started")
    _, (done,) = client.rest()
    assert (done["error"]["status"], done["error"]["retry_after"]) == (429, 2.5)
    assert done["choices"] == [{"index": 0, "seq": 0, "finish_reason": None}]
    assert gateway.running == 2
    client.start("f", **ENDLESS, max_tokens=1)
    client.rest()
    client.send("credit", id="b", tokens=1)
    assert client.tokens(1)[0]["id"] == "b"


def test_credit_is_of_no_use_to_a_generation_without_credits(client: StreamClient) -> None:
    client.start("a", **{**ENDLESS, "prompt": "a"})
    client.send("credit", id="a", tokens=1)
    while (message := client.receive())["type"] == "token":
        pass
    assert message["code"] == "no_credits"


@pytest.mark.parametrize(("frame", "code"), [("x" * 20_001, 1009), ("invalid UTF-8", 1007)])
def test_what_a_websocket_can_t_go_on_after_ends_it_and_its_generations_can_be_resumed(
    gateway: ScriptedGateway, frame: str, code: int
) -> None:
    with StreamClient(gateway.url) as client:
        client.start("a", credits=0, model="m", prompt="a", max_tokens=5)
        if code == 1007:
            client.connection.send(b"\xff\xfe", text=True)
        else:
            client.connection.send(frame)
        with pytest.raises(ConnectionClosed) as closed:
            client.receive()
        assert closed.value.rcvd
        assert closed.value.rcvd.code == code
    with StreamClient(gateway.url) as other:
        other.send("resume", id="b", resume_token=client.resume_tokens["a"], credits=None)
        other.receive("started")
        assert text_of(other.rest()[0]) == "0 1 2 3 4 "


def test_pages_of_other_sites_may_not_connect(gateway: ScriptedGateway) -> None:
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{gateway.server.config.port + 1}"):
        with pytest.raises(InvalidStatus) as refused:
            StreamClient(gateway.url, origin=origin)
        assert refused.value.response.status_code == 403
        assert json.loads(refused.value.response.body or b"")["error"]["code"] == "cross_site"
    with StreamClient(gateway.url, origin=gateway.url):
        pass


def test_only_its_caller_may_resume(gateway: ScriptedGateway) -> None:
    with StreamClient(gateway.url, token="mine") as client:
        client.start("a", model="m", prompt="a")
        client.tokens(3)
        client.drop()
    assert fruitless(gateway.url, client.resume_tokens["a"])["code"] == "unknown_generation"
    with StreamClient(
        gateway.url, opens=False, additional_headers={"Authorization": "Bearer mine"}
    ) as other:  # a client that is no browser
        other.send("open")
        other.receive("opened")
        other.send("resume", id="a", resume_token=client.resume_tokens["a"], received=[3])
        other.receive("started")
        assert text_of(other.tokens(2)).startswith("3 4 ")


def test_a_resume_takes_a_generation_from_a_connection_that_seems_alive(gateway: ScriptedGateway) -> None:
    with StreamClient(gateway.url) as one, StreamClient(gateway.url) as other:
        one.start("a", credits=5, **ENDLESS)
        assert text_of(one.tokens(5)) == "0 1 2 3 4 "
        resume = {"id": "b", "resume_token": one.resume_tokens["a"], "credits": 4}
        other.send("resume", **resume, received=[10**9])
        assert "no seq" in other.receive("error")["message"]
        other.send("resume", **resume, received=[3])
        other.receive("started")
        assert text_of(other.tokens(4)) == "3 4 5 6 "
        error = one.receive("error")
        assert (error["id"], error["code"]) == ("a", "resumed_elsewhere")
        assert fruitless_id(one, "a") == "unknown_id"
        other.send("resume", **resume, received=[2])  # the same connection, to go back
        other.receive("started")
        assert text_of(other.tokens(4)) == "2 3 4 5 "


def test_after_the_grace_nothing_is_left() -> None:
    with ScriptedGateway(ws_resume_grace=0.3) as gateway, StreamClient(gateway.url) as client:
        client.start("a", **ENDLESS)
        client.tokens(1)
        client.drop()
        gateway.wait(running=0, kept=0)
        assert fruitless(gateway.url, client.resume_tokens["a"])["status"] == 404
    assert gateway.hub._generations == {}


def test_what_is_kept_is_bounded_in_number_and_bytes() -> None:
    with (
        ScriptedGateway(ws_kept=2, ws_kept_bytes=50_000, ws_resume_grace=3600) as gateway,
        StreamClient(gateway.url) as client,
    ):
        for id in ("a", "b", "c"):
            client.start(id, **ENDLESS, max_tokens=1)
            client.rest()
        assert gateway.kept == 2
        assert fruitless(gateway.url, client.resume_tokens["a"])["code"] == "unknown_generation"
        client.start("d", **ENDLESS, max_tokens=1000)  # takes more than all may
        client.rest()
        gateway.wait(kept=0)
        client.start("e", **ENDLESS)
        client.tokens(1)
        client.drop()
        gateway.wait(running=0, kept=0)  # it grew too large while it was kept


def test_connections_over_which_nothing_happens_are_closed_and_those_that_run_are_not(gateway: ScriptedGateway) -> None:
    with (
        StreamClient(gateway.url, opens=False) as unopened,
        StreamClient(gateway.url) as idle,
        StreamClient(gateway.url) as busy,
    ):
        busy.start("a", credits=1, **ENDLESS)
        busy.tokens(1)
        gateway.wait(connections=3)
        gateway.sweep(later=11)
        with pytest.raises(ConnectionClosed, match="no open within 10 s"):
            unopened.receive()
        idle.send("ping")
        idle.receive("pong")
        gateway.sweep(later=301)
        with pytest.raises(ConnectionClosed, match="idle for 300 s; send a ping to stay"):
            idle.receive()
        busy.send("cancel", id="a")
        busy.rest()
        gateway.sweep(later=301)
        with pytest.raises(ConnectionClosed, match="idle"):
            busy.receive()


def test_a_client_that_does_not_read_is_cut_off_and_gets_the_rest_when_it_comes_back() -> None:
    with ScriptedGateway(ws_send_timeout=0.5, ws_ping_interval=3600) as gateway:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", gateway.server.config.port))
        with StreamClient(gateway.url, sock=deaf, max_queue=1) as client:
            client.start("a", model="m", prompt="big", max_tokens=1500)
            gateway.wait(running=0, sockets=0)
            got = list(map(json.loads, client.until_closed()))
        assert 0 < len(got) < 1500
        with StreamClient(gateway.url, max_size=None) as other:
            received = [got[-1]["seq"]]
            other.send("resume", id="a", resume_token=client.resume_tokens["a"], received=received)
            other.receive("started")
            assert text_of(got + other.rest()[0]) == "".join(f"{number} ".ljust(10_000) for number in range(1500))


def test_at_a_shutdown_what_runs_may_end_and_nothing_begins(gateway: ScriptedGateway) -> None:
    with ScriptedGateway() as own, StreamClient(own.url) as busy, StreamClient(own.url) as idle:
        busy.start("a", credits=1, **ENDLESS, max_tokens=20)
        busy.tokens(1)
        own.server.should_exit = True
        with pytest.raises(ConnectionClosed, match="1012"):
            idle.receive()
        busy.send("generate", id="b", request=ENDLESS)
        error = busy.receive("error")
        assert (error["status"], error["code"]) == (503, "going_away")
        busy.send("credit", id="a", tokens=100)
        assert busy.rest()[1][0]["choices"][0]["finish_reason"] == "length"
        with pytest.raises(ConnectionClosed, match="1012"):
            busy.receive()
