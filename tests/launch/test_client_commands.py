"""`chat` and `complete` against a double that speaks as Triton does, down to its errors with status 200."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner

from tidewright.launch.cli import main
from tidewright.launch.client import RequestFailedError, _Gateway
from tidewright_client import InvalidRequest


class Double(ThreadingHTTPServer):
    """Answers with `events`, or with `status` and `body`; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict]] = []
        self.events: list[dict | bytes] = []
        self.refusal: tuple[int, bytes] | None = None
        self.endless = False
        self.disconnected = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def says(self, *pieces: str, reason: str = "stop") -> None:
        self.events = [{"text_output": piece, "finish_reason": "None"} for piece in pieces]
        self.events.append({"text_output": "", "finish_reason": reason})


class Handler(BaseHTTPRequestHandler):
    server: Double

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        if self.server.refusal:
            status, text = self.server.refusal
            self._send(status, text)
        elif self.path == "/v2/models/tokenizer/infer":
            text = body["inputs"][0]["data"][0]
            ids = list(text.encode())
            self._send(200, json.dumps({"outputs": [{"name": "input_ids", "data": ids}]}).encode())
        else:
            self._stream()

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        for event in self.server.events:
            line = event if isinstance(event, bytes) else json.dumps(event, ensure_ascii=False).encode()
            data = b"data: " + line + b"\n\n"
            # Cut in the middle, maybe of a character: the client must not care.
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                self.wfile.write(part)
                self.wfile.flush()
        try:
            while self.server.endless:
                self.wfile.write(b'data: {"text_output": "la ", "finish_reason": "None"}\n\n')
                self.wfile.flush()
                time.sleep(0.02)
        except OSError:
            self.server.disconnected.set()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def double() -> Iterator[Double]:
    server = Double()
    # It looks so often, in seconds, whether it is to end.
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.endless = False
    server.shutdown()
    server.server_close()


def run(double: Double, *arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [*arguments, "--url", double.url], input=stdin)
    return result.exit_code, result.stdout, result.stderr


def test_complete_prints_what_comes_and_asks_as_documented(double: Double) -> None:
    double.says("Hello", " ", "wörld 👩‍👩‍👧", " 你好")
    options = ("--max-tokens", "5", "--seed", "7", "--stop", "a", "--stop", "b", "--top-p", "0.5")
    assert run(double, "complete", "Say: hällo", *options) == (0, "Hello wörld 👩‍👩‍👧 你好\n", "")
    ((path, body),) = double.asked
    assert path == "/v2/models/decoder/generate_stream"
    sampling = json.loads(body.pop("sampling_parameters"))
    assert body == {"text_input": "Say: hällo", "stream": True, "return_finish_reason": True}
    expected = {"max_tokens": 5, "temperature": 0.0, "top_p": 0.5, "seed": 7, "stop": ["a", "b"]}
    assert sampling == expected


def test_the_sampling_parameters_are_such_as_the_server_takes(double: Double) -> None:
    import msgspec

    from tidewright.schema import SamplingParams

    double.says("x")
    run(double, "complete", "hi", "--stop", "z", "--seed", "1")
    sampling = msgspec.json.decode(double.asked[0][1]["sampling_parameters"], type=SamplingParams)
    assert sampling == SamplingParams(max_tokens=256, temperature=0, top_p=1.0, seed=1, stop=["z"])


def test_chat_tokenizes_first_and_sends_the_ids(double: Double) -> None:
    double.says("Paris", ".")
    assert run(double, "chat", "Capital?", "--system", "Be brief.") == (0, "Paris.\n", "")
    (tokenizer_path, tokenizer_body), (decoder_path, decoder_body) = double.asked
    assert (tokenizer_path, decoder_path) == (
        "/v2/models/tokenizer/infer",
        "/v2/models/decoder/generate_stream",
    )
    (tensor,) = tokenizer_body["inputs"]
    assert (tensor["name"], tensor["shape"], tensor["datatype"]) == ("messages", [1, 1], "BYTES")
    assert json.loads(tensor["data"][0]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Capital?"},
    ]
    assert bytes(decoder_body["input_ids"]).decode() == tensor["data"][0]
    assert json.loads(decoder_body["sampling_parameters"])["temperature"] == 0.7


def test_text_comes_through_standard_input(double: Double) -> None:
    double.says("x")
    assert run(double, "complete", stdin="zwei\nZeilen ü\n".encode())[0] == 0
    assert double.asked[0][1]["text_input"] == "zwei\nZeilen ü"
    assert run(double, "chat", stdin=b"question")[0] == 0
    assert "question" in double.asked[1][1]["inputs"][0]["data"][0]


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_no_text_at_all_is_a_wrong_usage(double: Double, command: str) -> None:
    code, _, error = run(double, command, stdin=b"")
    assert code == 2
    assert "standard input" in error


def test_separators_of_unicode_do_not_cut_an_event(double: Double) -> None:
    double.says("a\u2028b\u0085c")
    assert run(double, "complete", "hi") == (0, "a\u2028b\u0085c\n", "")


def test_bytes_that_are_no_text_do_no_harm(double: Double) -> None:
    double.says("x")
    command = [sys.executable, "-c", "from tidewright.launch.cli import main; main()", "complete", "--url", double.url]
    result = subprocess.run([*command, b"caf\xe9"], capture_output=True, check=False)
    assert (result.returncode, result.stdout) == (0, b"x\n")
    assert double.asked[0][1]["text_input"] == "caf?"


def test_bytes_that_are_no_text_do_no_harm_before_a_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what its client refuses before anything is sent."""
    asked: list[Any] = []

    def refuse(*words: Any, extra: Any) -> None:
        asked.extend((*words, extra))
        raise InvalidRequest("no such thing")

    gateway = _Gateway("http://127.0.0.1:1", None, "m")
    monkeypatch.setattr(gateway._client, "stream_complete", refuse)
    monkeypatch.setattr(gateway._client, "stream_chat", refuse)
    for deltas in (
        gateway.complete("caf\udce9", {"stop": ["\udce9"]}),
        gateway.chat([{"role": "user", "content": "caf\udce9"}], {}),
    ):
        with pytest.raises(RequestFailedError, match="no such thing"):
            next(deltas)
    assert asked == ["caf?", {"stop": ["?"]}, [{"role": "user", "content": "caf?"}], {}]


def test_an_error_in_the_stream_ends_with_its_message(double: Double) -> None:
    double.says("Hel")
    double.events[-1] = {"error": "the engine is restarting"}
    assert run(double, "complete", "hi") == (1, "Hel", "Error: the engine is restarting\n")


@pytest.mark.parametrize("prefix", [b"", b"data: "])
@pytest.mark.parametrize("command", ["chat", "complete"])
def test_a_refusal_is_one_line(double: Double, command: str, prefix: bytes) -> None:
    double.refusal = (400, prefix + b'{"error":"max_tokens is too large"}\n\n')
    assert run(double, command, "hi") == (1, "", "Error: max_tokens is too large\n")


def test_another_kind_of_server_is_noticed(double: Double) -> None:
    double.refusal = (404, b"<html>")
    assert run(double, "complete", "hi")[2] == (
        "Error: the server answered with status 404; is it a Tidewright server?\n"
    )
    double.refusal = (200, b"{}")
    assert "is no Tidewright server" in run(double, "chat", "hi")[2]
    double.refusal = (200, b"data: <html>\n")
    assert "not JSON" in run(double, "complete", "hi")[2]


def test_the_address_may_come_without_http(double: Double) -> None:
    double.says("Hello")
    result = CliRunner().invoke(main, ["complete", "hi", "--url", double.url.removeprefix("http://")])
    assert (result.exit_code, result.stdout) == (0, "Hello\n")


def test_an_answer_that_breaks_off_is_an_error(double: Double) -> None:
    double.says("Hel")
    double.events.pop()
    code, text, error = run(double, "complete", "hi")
    assert (code, text) == (1, "Hel\n")
    assert "broke off" in error


def test_an_unusual_end_is_named(double: Double) -> None:
    double.says("Hel", reason="timeout")
    assert run(double, "complete", "hi")[2] == "Error: the server ended the answer early: timeout\n"


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_a_server_of_embeddings_is_said_to_be_one(double: Double, command: str) -> None:
    double.refusal = 400, b'{"error": "this server runs with --task embed and generates no text [invalid]"}'
    said = run(double, command, "hi")[2]
    assert said.startswith(f"Error: {double.url} runs with --task embed and generates no text; ask its gateway's /v1/")


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_no_server_is_one_clear_line(command: str) -> None:
    result = CliRunner().invoke(main, [command, "hi", "--url", "http://127.0.0.1:1"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no server at http://127.0.0.1:1 (")
    assert "tidewright serve" in result.stderr
    assert result.stderr.count("\n") == 1


def test_ctrl_c_stops_the_answer_and_closes_the_connection(double: Double) -> None:
    double.endless = True
    command = [sys.executable, "-c", "from tidewright.launch.cli import main; main()", "complete", "hi"]
    with subprocess.Popen([*command, "--url", double.url], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == b"la "  # pieces come at once, though it is no terminal
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert double.disconnected.wait(10)


class Conversation:
    """`tidewright chat` at a terminal."""

    def __init__(self, double: Double) -> None:
        self._terminal, theirs = pty.openpty()
        code = "from tidewright.launch.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "chat", "--url", double.url],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        self._seen = b""

    def type(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def see(self, text: bytes) -> None:
        """Wait for `text`, from where the last one ended."""
        deadline = time.monotonic() + 20
        while text not in self._seen:
            assert time.monotonic() < deadline, self._seen
            self._seen += os.read(self._terminal, 4096)
        self._seen = self._seen.partition(text)[2]

    def exit_code(self) -> int:
        code = self.process.wait(20)
        os.close(self._terminal)
        return code


def test_a_conversation_remembers_and_survives_ctrl_c_and_errors(double: Double) -> None:
    double.says("Guten Tag")
    talk = Conversation(double)
    talk.see(b"> ")
    talk.type(b"hallo\n")
    talk.see(b"Guten Tag\r\n> ")

    double.events, double.endless = [], True
    talk.type(b"sing\n")
    talk.see(b"la la ")
    talk.process.send_signal(signal.SIGINT)
    talk.see(b"> ")
    assert double.disconnected.wait(10)

    double.endless, double.refusal = False, (400, b'{"error":"too long"}')
    talk.type(b"refused\n")
    talk.see(b"Error: too long\r\n> ")

    double.refusal = None
    double.says("fine")
    talk.type(b"and now?\n")
    talk.see(b"fine\r\n> ")
    talk.type(b"\x04")
    assert talk.exit_code() == 0

    last = [body for path, body in double.asked if path.endswith("infer")][-1]
    messages = json.loads(last["inputs"][0]["data"][0])
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["hallo", "sing", "and now?"]
    assert messages[1]["content"] == "Guten Tag"
    assert messages[3]["content"].startswith("la la ")
