"""A start waits for a real answer, and a request that is lost does not take all of its time."""

from __future__ import annotations

import socket
import threading
from contextlib import closing
from pathlib import Path

import pytest

from tidewright.config import Settings
from tidewright.launch import server as module
from tidewright.launch.server import ABORTS_AT_START, ServerStartError, TritonServer

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n" + b'{"served_by": "decoder"}'


class _Answering:
    """Swallows the first requests, then answers."""

    def __init__(self, swallowed: int, answer: bytes = ANSWER) -> None:
        self._swallowed, self._answer, self.asked = swallowed, answer, 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._kept: list[socket.socket] = []
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._kept.append(connection)
            self.asked += 1
            connection.recv(65536)
            if self.asked > self._swallowed:
                connection.sendall(self._answer)
                connection.close()

    def close(self) -> None:
        self._socket.close()
        for connection in self._kept:
            connection.close()


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonServer, "running", True)
    monkeypatch.setattr(module, "FIRST_PATIENCE", 0.1)


@pytest.mark.usefixtures("starting")
@pytest.mark.parametrize("swallowed", [0, 1, 3])
def test_a_request_that_is_lost_is_sent_again(swallowed: int) -> None:
    with closing(_Answering(swallowed)) as answering:
        server = TritonServer(Settings(http_port=answering.port), Path())
        server.wait_ready()
        assert server.ready
        assert answering.asked == swallowed + 1
        assert sum("asking again" in line for line in server.log_tail) == swallowed


@pytest.mark.usefixtures("starting")
def test_one_that_never_answers_is_given_up_with_the_last_lines_of_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.0)
    with closing(_Answering(1000)) as answering:
        server = TritonServer(Settings(http_port=answering.port, start_timeout=1), Path())
        server.log_tail.append("E1129 something is wrong\n")
        with pytest.raises(ServerStartError, match=r"(?s)start_timeout.*something is wrong.*asking again"):
            server.wait_ready()


class _Aborting(TritonServer):
    """Ends `aborts` times while it starts, with these last words, and then answers."""

    def __init__(self, answering: _Answering, aborts: int, words: str = ABORTS_AT_START) -> None:
        super().__init__(Settings(http_port=answering.port), Path())
        self._aborts, self._words, self.starts = aborts, words, 0

    @property
    def running(self) -> bool:
        return self.starts > self._aborts

    def start(self) -> None:
        self.starts += 1
        self.log_tail.clear()
        if not self.running:
            self.log_tail.append(f"terminate called after throwing an instance of '{self._words}'\n")

    def kill(self) -> None:
        pass

    def _why_it_ended(self) -> str:
        return "".join(self.log_tail)


def test_a_triton_that_aborts_at_its_start_is_started_again_once() -> None:
    with closing(_Answering(0)) as answering:
        server = _Aborting(answering, aborts=1)
        server.start()
        server.wait_ready()
        assert server.ready
        assert server.starts == 2
        assert "aborted while it started" in server.log_tail[-1]


@pytest.mark.parametrize(("aborts", "words", "starts"), [(2, ABORTS_AT_START, 2), (1, "std::bad_alloc", 1)])
def test_one_that_aborts_again_or_for_another_reason_is_not(aborts: int, words: str, starts: int) -> None:
    with closing(_Answering(0)) as answering:
        server = _Aborting(answering, aborts, words)
        server.start()
        with pytest.raises(ServerStartError, match="terminate called"):
            server.wait_ready()
        assert server.starts == starts


def test_a_start_after_an_end_is_with_the_first_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another that can't be loaded any more would end it."""
    asked: list[str] = []

    def answer(url: str, *_: object) -> bytes:
        asked.append(url.partition("/v2/models/")[2])
        return b'{"served_by": "decoder", "text_output": ""}'

    monkeypatch.setattr(module, "post", answer)
    monkeypatch.setattr(TritonServer, "running", True)
    monkeypatch.setattr(TritonServer, "start", lambda _: None)
    server = TritonServer(Settings(models=["small=x"]), Path())  # type: ignore[list-item]
    server.wait_ready()
    assert "decoder_small" in server.models
    server.start_again()
    assert asked == ["generate/generate", "generate_small/generate", "generate/generate"]
    assert server.models == {"tokenizer", "decoder", "failsafe", "generate", "generate_direct"}
    assert server.models_with_engine == {"decoder", "decoder_small"}


@pytest.mark.usefixtures("starting")
def test_a_server_that_refuses_the_first_request_for_good_says_why_at_once() -> None:
    body = b'{"error": "the prompt has 3 tokens, but prompts and output are limited to 2 [invalid]"}'
    answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with closing(_Answering(0, answer)) as answering:
        server = TritonServer(Settings(http_port=answering.port), Path())
        with pytest.raises(ServerStartError, match="refuses even 'Hello' and one token: the prompt has 3 tokens"):
            server.wait_ready()
        assert answering.asked == 1
