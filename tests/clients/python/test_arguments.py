"""What callers give wrongly is seen at once, before anything is sent, and named."""

from __future__ import annotations

import asyncio
import importlib
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tidewright_client import AsyncClient, Client, InvalidRequest
from tidewright_client.sessions.core import SessionCore
from tidewright_client.triton import AsyncTritonClient, TritonClient

CHAT = [{"role": "user", "content": "Hi"}]
NOBODY = "http://127.0.0.1:1"
CUT = "a\ud83d"  # half of an emoji, as Java and JavaScript cut one


@pytest.mark.parametrize("make", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("url", 5),
        ("key", 5),
        ("key", b""),
        ("model", 5),
        ("timeout", "1"),
        ("timeout", True),
        ("idle_timeout", None),
        ("max_retries", "2"),
        ("max_retries", 2.0),
        ("max_answer_bytes", "1"),
        ("hooks", print),
        ("tls", True),
    ],
)
def test_a_wrong_type_names_its_argument(make: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be"):
        make(**{name: value})


@pytest.mark.parametrize("make", [TritonClient, AsyncTritonClient])
@pytest.mark.parametrize(("name", "value"), [("address", 5), ("timeout", "1"), ("max_retries", "2")])
def test_a_wrong_type_to_a_client_of_triton(make: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be"):
        make(**{name: value})


@pytest.mark.parametrize("make", [Client, AsyncClient, TritonClient, AsyncTritonClient])
@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf])
def test_a_timeout_out_of_range(make: Callable[..., Any], timeout: float) -> None:
    with pytest.raises(ValueError, match=r"^timeout must be above 0 .* None for no end"):
        make(timeout=timeout)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf])
def test_a_timeout_out_of_range_of_one_call(timeout: float) -> None:
    with Client(NOBODY, model="m", max_retries=0) as client, TritonClient("127.0.0.1:1") as triton:
        calls: list[Callable[[], object]] = [
            lambda: client.chat(CHAT, timeout=timeout),
            lambda: client.stream_complete("x", timeout=timeout),
            lambda: AsyncClient(NOBODY, model="m").stream_chat(CHAT, timeout=timeout),
            lambda: triton.generate("x", timeout=timeout),
            lambda: triton.stream("x", timeout=timeout),
            lambda: triton.tokenize("x", timeout=timeout),
            lambda: triton.health(timeout=timeout),
        ]
        for call in calls:
            with pytest.raises(InvalidRequest, match=r"^timeout must be above 0") as caught:
                call()
            assert caught.value.param == "timeout"
        with pytest.raises(TypeError, match=r"^timeout must be a number"):
            client.chat(CHAT, timeout="1")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("options", "field"),
    [
        (lambda value: {"temperature": value}, "temperature"),
        (lambda value: {"extra": {"logit_bias": {"5": value}}}, "logit_bias.5"),
        (lambda value: {"response_format": {"a": [1, {"b": value}]}}, "response_format.a[1].b"),
    ],
)
def test_numbers_that_json_has_not(value: float, options: Callable[[float], Any], field: str) -> None:
    with Client(NOBODY, model="m") as client:
        for call in (client.chat, client.stream_chat):
            with pytest.raises(InvalidRequest) as caught:
                call(CHAT, **options(value))
            assert caught.value.message.startswith(f"{field} is ")
            assert caught.value.param == field.partition(".")[0]


def test_numbers_that_json_has_not_to_triton() -> None:
    with TritonClient("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match=r"^temperature is nan"):
        client.stream("x", temperature=math.nan)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, "prompt"),
        ({"stop": ["a", CUT]}, "stop[1]"),
        ({"extra": {"metadata": {CUT: 1}}}, "metadata"),
        ({"extra": {CUT: 1}}, "the name of a field"),
        ({"model": CUT}, "model"),
    ],
)
def test_half_a_character_is_refused_before_it_is_sent(options: dict[str, Any], path: str) -> None:
    """As "?" it would be another text; and in a session it would break the connection of all generations."""
    prompt = "x" if options else CUT
    with Client(NOBODY, model="m") as client, client.session() as session:
        for call in (client.complete, client.stream_complete, session.stream_complete):
            with pytest.raises(InvalidRequest, match="is not valid Unicode") as caught:
                call(prompt, **options)
            assert caught.value.message.startswith(f"{path} ")
        assert not session._core.live


def test_half_a_character_to_triton() -> None:
    with TritonClient("127.0.0.1:1") as client:
        for options in ({"model": CUT}, {"request_id": CUT}, {"traceparent": CUT}, {"cache_salt": CUT}):
            with pytest.raises(InvalidRequest, match="is not valid Unicode") as caught:
                client.stream("x", **options)
            assert caught.value.param == next(iter(options))


def test_values_that_json_has_not() -> None:
    with Client(NOBODY, model="m") as client:
        with pytest.raises(TypeError, match=r"^metadata\.a must be a value that JSON has, not set"):
            client.chat(CHAT, extra={"metadata": {"a": {1}}})
        loop: list[Any] = []
        loop.append(loop)
        with pytest.raises(InvalidRequest, match="nested too deeply"):
            client.chat(CHAT, extra={"metadata": loop})
        for messages in ("Hi", 5, {"role": "user"}, ["Hi"]):
            with pytest.raises(TypeError, match=r"^messages must be a list like"):
                client.chat(messages)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/stream"])
def test_an_address_with_a_path_of_the_api(path: str) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises(InvalidRequest, match="give the gateway's URL, without a path"):
            make(f"http://127.0.0.1:8080{path}")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (f"http://{'a' * 64}:8080", "label too long"),
        ("http://a..b", "label"),
        ("http://a\tb", "non-printable"),
        ("http://a\u2026b", "IDNA"),
    ],
)
def test_a_host_whose_name_can_not_be_one(url: str, why: str) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises(InvalidRequest, match="is no address of a gateway") as caught:
            make(url)
        assert why in caught.value.message


@pytest.mark.parametrize("url", ["ftp://me:secret@h", "me:secret@h", "http://me:secret@h:a", "http://me:secret@[::1"])
def test_a_password_in_a_wrong_address_is_not_shown(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Client(url)
    assert "secret" not in caught.value.message


def test_a_scheme_in_capitals() -> None:
    core = SessionCore(Client("HTTP://http-host:8080")._settings)
    assert (core.settings.url, core.address) == ("http://http-host:8080", "ws://http-host:8080/v1/stream")


def test_a_closed_client_says_so() -> None:
    client = Client(NOBODY, model="m")
    stream = client.stream_chat(CHAT)
    client.close()
    calls: list[Callable[[], object]] = [
        lambda: client.chat(CHAT),
        lambda: list(client.stream_chat(CHAT)),
        lambda: list(stream),
        client.models,
        client.health,
        client.session,
    ]
    for call in calls:
        with pytest.raises(InvalidRequest, match="the client is closed"):
            call()


def test_a_closed_async_client_says_so() -> None:
    async def run() -> None:
        client = AsyncClient(NOBODY, model="m")
        await client.aclose()
        with pytest.raises(InvalidRequest, match="the client is closed"):
            await client.chat(CHAT)
        with pytest.raises(InvalidRequest, match="the client is closed"):
            [event async for event in client.stream_chat(CHAT)]
        with pytest.raises(InvalidRequest, match="the client is closed"):
            client.session()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("lacks", "module", "extra"),
    [
        ("tritonclient.grpc", "tidewright_client.triton", "triton"),
        ("grpc", "tidewright_client.triton", "triton"),
        ("websockets.exceptions", "tidewright_client.sessions.connecting", "websocket"),
        ("opentelemetry", "tidewright_client.otel", "otel"),
    ],
)
def test_a_missing_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, lacks: str, module: str, extra: str
) -> None:
    kept = {name: loaded for name, loaded in sys.modules.items() if name == module or name.startswith(f"{module}.")}
    for name in kept:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, lacks, None)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(module)
    assert f"clients/python[{extra}]'" in str(caught.value)
