"""launch/control.py: what an answer means, and one that does not come. Against scripted sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from tidewright import schema
from tidewright.launch import control as control_module
from tidewright.launch.control import (
    DeadStubError,
    NoAnswerError,
    Question,
    TroubleError,
    UnreachableError,
    Waiting,
    ask,
    check_alive,
    control,
    post,
)
from tidewright.schema import DRAINING, DecoderStatus

PATIENCE = 20.0  # seconds


@contextlib.contextmanager
def listener(answer: bytes | None) -> Iterator[str]:
    """Gives each connection the same answer and closes it; None: says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    held.append(connection)
                    if answer is not None:
                        connection.recv(65536)
                        connection.sendall(answer)
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def response(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


def finish(asking: Waiting[bytes]) -> bytes:
    while True:
        try:
            next(asking)
        except StopIteration as end:
            return bytes(end.value)


def test_a_good_answer_is_handed_out() -> None:
    with listener(response(200, b'{"text_output": "ok"}')) as url:
        control(url, "health", PATIENCE)
        assert json.loads(post(f"{url}/x", {}, PATIENCE)) == {"text_output": "ok"}


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (response(400, b'{"error": "no such model"}'), TroubleError, "^no such model$"),
        (response(500, b"oops"), TroubleError, "status 500; is it a Tidewright server"),
        (response(400, b"[]"), TroubleError, "status 400"),
        (response(400, b'{"error": "Stub process \'a\' is not healthy."}'), DeadStubError, "Stub process"),
        (b"", UnreachableError, "^can't reach http://127"),
        (b"nonsense\r\n\r\n", UnreachableError, "^can't reach http://127"),
    ],
)
def test_what_an_answer_means(answer: bytes, error: type[Exception], message: str) -> None:
    with listener(answer) as url, pytest.raises(error, match=message):
        control(url, "health", PATIENCE)


def test_silence_ends_in_time() -> None:
    with listener(None) as url, pytest.raises(NoAnswerError, match="did not answer within 0"):
        control(url, "health", 0.1)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a", "http://", "http://[::1", "http://a:b", "http://\x00"]
)
def test_an_address_that_is_none_is_one_line(url: str) -> None:
    with pytest.raises(UnreachableError, match="can't reach"):
        control(url, "health", 1)


def test_a_question_blocks_nobody() -> None:
    with listener(None) as url:
        question = Question(url)
        assert not question.answered
        question.close()
        began = time.monotonic()
        with pytest.raises(NoAnswerError):
            finish(ask(url, {}, 0.2))
        assert time.monotonic() - began >= 0.2
    with listener(response(200, b"{}")) as url:
        assert finish(ask(url, {}, PATIENCE)) == b"{}"


def status(trouble: str) -> bytes:
    answered = msgspec.json.encode(DecoderStatus(trouble, trouble == DRAINING, 0, 0, 0, 0)).decode()
    return response(200, json.dumps({"text_output": answered}).encode())


@pytest.mark.parametrize("trouble", ["", DRAINING, "the engine is not available (killed by SIGKILL)"])
def test_who_answers_is_alive_whatever_it_says_of_its_engine(trouble: str) -> None:
    with listener(status(trouble)) as url:
        check_alive(url, PATIENCE)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (status(f"{schema.STUCK}Triton has not taken a response"), TroubleError, "^stuck: Triton has not taken"),
        (response(400, b'{"error": "unknown model \'decoder\'"}'), TroubleError, "unknown model"),
        (response(400, b'{"error": "Stub process \'a\' is not healthy."}'), DeadStubError, "Stub process"),
        (response(200, b'{"text_output": "ok"}'), TroubleError, "did not answer as the decoder does"),
        (response(200, b'{"text_output": "{}"}'), TroubleError, "did not answer as the decoder does"),
        (None, NoAnswerError, "did not answer within"),
    ],
)
def test_what_only_a_restart_mends_is_not_alive(answer: bytes | None, error: type[Exception], message: str) -> None:
    with listener(answer) as url, pytest.raises(error, match=message):
        check_alive(url, PATIENCE if answer else 0.2)


def test_stuck_is_one_word() -> None:
    assert control_module.STUCK == schema.STUCK


@pytest.mark.parametrize("flags", [[], ["--live"]], ids=["ready", "live"])
@pytest.mark.parametrize("answer", [b"{}", b'{"status": "ready"}'], ids=["triton", "gateway"])
def test_the_health_command_imports_nothing_heavy(answer: bytes, flags: list[str]) -> None:
    """It is a probe, run every few seconds beside the model."""
    answer = b'{"text_output": "{\\"trouble\\": \\"\\"}"}' if (answer, flags) == (b"{}", ["--live"]) else answer
    with listener(response(200, answer)) as url:
        code = (
            "import sys\n"
            f"sys.argv = ['tidewright', 'health', '--url', {url.removeprefix('http://')!r}, *{flags}]\n"
            "from tidewright.launch.cli import main\n"
            "try: main()\n"
            "except SystemExit as end: assert end.code == 0\n"
            "heavy = {'torch', 'numpy', 'pydantic', 'httpx', 'rich', 'msgspec', 'psutil', 'tokenizers', 'asyncio'}\n"
            "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n" if flags else "healthy\n", "")


@pytest.mark.parametrize("more", [0, 1])
def test_an_answer_that_is_too_long_is_refused_and_not_cut(monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    """Half of the metrics would say that requests have ended which run."""
    monkeypatch.setattr(control_module, "MAX_ANSWER", 1000)
    with listener(response(200, b"x" * (1000 + more))) as url:
        if more:
            with pytest.raises(TroubleError, match="answered with more than 1000 bytes"):
                Question(url).answer(PATIENCE)
        else:
            assert Question(url).answer(PATIENCE) == b"x" * 1000
