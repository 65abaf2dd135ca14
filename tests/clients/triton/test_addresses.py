"""Addresses that users get wrong: each error says what to change."""

from __future__ import annotations

import asyncio

import pytest

from helpers.listener import listener
from tidewright_client import ConnectionFailed, InvalidRequest, TidewrightError
from tidewright_client.triton import AsyncTritonClient, TritonClient

HTTP = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def failures(address: str) -> list[TidewrightError]:
    """Over the stream and by a call of its own, sync and async."""

    async def in_a_loop() -> TidewrightError:
        async with AsyncTritonClient(address, max_retries=0, timeout=30) as client:
            with pytest.raises(TidewrightError) as caught:
                await client.generate("x")
        return caught.value

    with TritonClient(address, max_retries=0, timeout=30) as client:
        with pytest.raises(TidewrightError) as streamed:
            client.generate("x")
        with pytest.raises(TidewrightError) as asked:
            client.tokenize("x")
    return [streamed.value, asked.value, asyncio.run(in_a_loop())]


def test_a_host_that_there_is_not() -> None:
    for error in failures("no-such-host.invalid:8001"):
        assert isinstance(error, ConnectionFailed)
        assert "check the host's name" in error.message


def test_nobody_listens() -> None:
    for error in failures("127.0.0.1:1"):
        assert isinstance(error, ConnectionFailed)
        assert "check host and port (8001 by default), and that it runs" in error.message


@pytest.mark.parametrize("said", [HTTP, b""])
def test_what_listens_does_not_speak_grpc(said: bytes) -> None:
    with listener(said) as address:
        for error in failures(address):
            assert "does not speak gRPC" in error.message
            assert "8001 by default" in error.message


def test_a_stream_is_read_once() -> None:
    with TritonClient("127.0.0.1:1", max_retries=0) as client:
        stream = client.stream("x")
        stream.close()
        with pytest.raises(InvalidRequest, match="read once"):
            list(stream)
