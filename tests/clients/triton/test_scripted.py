"""The clients before a Triton that does what real ones seldom do: breaks off, falls silent, talks nonsense."""

from __future__ import annotations

import gc
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import grpc
import pytest

from helpers.both_clients import Clients
from helpers.scripted_stream import PATIENCE, ScriptedCall, ScriptedStream, texts
from tidewright.bench.machine import free_ports
from tidewright_client.answers import Answer
from tidewright_client.errors import (
    ConnectionFailed,
    Interrupted,
    InvalidRequest,
    TidewrightError,
    TimedOut,
    Unavailable,
    UnexpectedAnswer,
)
from tidewright_client.hooks import CallInfo, Hooks
from tidewright_client.triton import Piece, TritonClient, exchange

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def triton() -> Iterator[ScriptedStream]:
    with ScriptedStream() as running:
        yield running


class Background:
    """A call that blocks, in a thread."""

    def __init__(self, job: Callable[[], Any]) -> None:
        self._job, self._result, self._error = job, None, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._job()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self._error:
            raise self._error
        return self._result


def begun(triton: ScriptedStream, stream: Any) -> tuple[ScriptedCall, str, Piece]:
    """The call, the request's id and the first piece of a stream."""
    first = Background(lambda: next(stream))
    call = triton.next_call()
    request = call.next_request()
    call.token(request.id, "one")
    return call, request.id, first.result()


def test_a_stream_that_breaks_leaves_what_came_and_the_next_request_connects_anew(
    clients: Clients, triton: ScriptedStream
) -> None:
    with clients(triton.address) as client:
        stream = client.stream("a")
        call, request_id, _ = begun(triton, stream)
        waiting = Background(lambda: client.generate("b"))
        call.next_request()
        call.end(grpc.StatusCode.UNAVAILABLE)
        with pytest.raises(Interrupted) as cut:
            next(stream)
        assert cut.value.request_id == request_id
        assert (cut.value.partial.text, cut.value.partial.token_ids) == ("one", [7])
        assert next(stream, None) is None
        with pytest.raises(ConnectionFailed):
            waiting.result()
        again = Background(lambda: client.generate("c"))
        second = triton.next_call()
        second.token(second.next_request().id, "well", "stop")
        assert again.result().text == "well"


def test_a_stream_that_triton_ends_is_no_end_of_an_answer(clients: Clients, triton: ScriptedStream) -> None:
    with clients(triton.address) as client:
        stream = client.stream("a")
        call, _, _ = begun(triton, stream)
        call.end()
        with pytest.raises(Interrupted, match="shutting down"):
            next(stream)


def test_retries_only_what_has_not_begun(clients: Clients, triton: ScriptedStream) -> None:
    with clients(triton.address, max_retries=2) as client:
        answer = Background(lambda: client.generate("a"))
        triton.next_call().end(grpc.StatusCode.UNAVAILABLE)
        call = triton.next_call()
        call.error(call.next_request().id, "try again later [overloaded]")
        call.token(call.next_request().id, "third", "stop")
        assert answer.result().text == "third"
        stream = client.stream("a")
        first = Background(lambda: next(stream))
        request = call.next_request()
        call.token(request.id, "one")
        first.result()
        call.error(request.id, "the engine died [engine_failed]")
        with pytest.raises(Unavailable) as failed:
            next(stream)
        assert failed.value.partial.text == "one"
        assert call.requests.empty()


def test_closing_or_dropping_a_stream_cancels_by_id(clients: Clients, triton: ScriptedStream) -> None:
    with clients(triton.address) as client:
        stream = client.stream("a")
        call, first, _ = begun(triton, stream)
        stream.close()
        cancel = call.next_request()
        assert call.tensors(cancel) == {"control": texts(f"cancel:{first}")}
        assert next(stream, None) is None
        dropped = client.stream("b")
        reading = Background(lambda it=dropped: next(it))
        second = call.next_request().id
        call.token(second, "one")
        reading.result()
        del dropped, reading
        gc.collect()
        assert call.tensors(call.next_request()) == {"control": texts(f"cancel:{second}")}


def test_what_has_ended_is_not_cancelled(clients: Clients, triton: ScriptedStream) -> None:
    with clients(triton.address) as client:
        stream = client.stream("a")
        call, request_id, _ = begun(triton, stream)
        call.token(request_id, "two", "stop")
        assert [piece.text for piece in stream] == ["two"]
        stream.close()
        answer = Background(lambda: client.generate("b"))
        request = call.next_request()  # nothing was sent in between
        assert "text_input" in call.tensors(request)
        call.token(request.id, "x", "length")
        assert answer.result().finish_reason == "length"


def test_silence_ends_a_request_and_is_cancelled(clients: Clients, triton: ScriptedStream) -> None:
    with clients(triton.address, idle_timeout=0.3) as client:
        with pytest.raises(TimedOut, match="idle_timeout"):
            client.generate("a")
        call = triton.next_call()
        silent = call.next_request().id
        assert call.tensors(call.next_request()) == {"control": texts(f"cancel:{silent}")}
        stream = client.stream("b")  # nobody spoke on that stream, so this comes over another
        begun(triton, stream)
        with pytest.raises(Interrupted, match="idle_timeout") as cut:
            next(stream)
        assert cut.value.partial.text == "one"


def test_the_timeout_of_a_request_is_told_and_kept(clients: Clients, triton: ScriptedStream) -> None:
    with clients(triton.address) as client:
        with pytest.raises(TimedOut, match=r"timeout of 0\.4 s"):
            client.generate("a", timeout=0.4)
        call = triton.next_call()
        sampling = call.tensors(call.next_request())["sampling_parameters"]
        assert 0.1 < float(sampling.rpartition(b": ")[2].rstrip(b"}")) <= 0.2


def test_a_slow_reader_holds_up_nobody_and_has_a_bound(clients: Clients, triton: ScriptedStream) -> None:
    with clients(triton.address, max_buffer_bytes=20_000) as client:
        slow = client.stream("slow")
        call, slow_id, _ = begun(triton, slow)
        other = Background(lambda: client.generate("other"))
        other_id = call.next_request().id
        for _ in range(1000):
            call.token(slow_id, "x" * 100)
        call.token(other_id, "whole", "stop")
        assert other.result().text == "whole"  # nobody has read of the other
        assert call.tensors(call.next_request()) == {"control": texts(f"cancel:{slow_id}")}
        found: list[Piece] = []
        with pytest.raises(Interrupted, match="more than 20000 bytes") as cut:
            found.extend(slow)
        assert cut.value.partial.text == "one" + "x" * 100 * (len(cut.value.partial.token_ids) - 1)
        assert 50 < len(cut.value.partial.token_ids) < 200


def test_a_stream_is_closed_when_it_is_idle_and_the_connection_stays(clients: Clients, triton: ScriptedStream) -> None:
    with clients(triton.address) as client:
        for _ in range(2):
            answer = Background(lambda: client.generate("a"))
            call = triton.next_call()
            call.token(call.next_request().id, "x", "stop")
            answer.result()
            assert call.requests.get(timeout=PATIENCE) is None


def test_a_stream_grows_old(clients: Clients, triton: ScriptedStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_AGE", 0.0)
    with clients(triton.address) as client:
        stream = client.stream("a")
        call, request_id, _ = begun(triton, stream)
        answer = Background(lambda: client.generate("b"))
        while call.requests.empty() and triton.calls.empty():
            pass
        # Whether it came before the stream was seen to be old or after, it is answered; and what runs goes on.
        second = call if triton.calls.empty() else triton.next_call()
        second.token(second.next_request().id, "x", "stop")
        answer.result()
        call.token(request_id, "two", "stop")
        assert [piece.text for piece in stream] == ["two"]
        assert call.requests.get(timeout=PATIENCE) is None


def test_closing_the_client_ends_what_runs(clients: Clients, triton: ScriptedStream) -> None:
    client = clients(triton.address)
    stream = client.stream("a")
    call, request_id, _ = begun(triton, stream)
    closing = Background(client.close)
    assert call.tensors(call.next_request()) == {"control": texts(f"cancel:{request_id}")}
    assert call.requests.get(timeout=PATIENCE) is None
    closing.result()
    for use in (lambda: next(stream), lambda: client.generate("b")):
        with pytest.raises(InvalidRequest, match="the client is closed"):
            use()


def test_two_requests_of_one_id_are_not_mixed_up(clients: Clients, triton: ScriptedStream) -> None:
    with clients(triton.address) as client:
        stream = client.stream("a", request_id="mine")
        begun(triton, stream)
        with pytest.raises(InvalidRequest, match="in flight already"):
            client.generate("b", request_id="mine")


def test_an_answer_that_can_not_be_read_is_named(clients: Clients, triton: ScriptedStream) -> None:
    with clients(triton.address) as client:
        answer = Background(lambda: client.generate("a"))
        call = triton.next_call()
        call.say(call.next_request().id, final=True, output=b"x")
        with pytest.raises(UnexpectedAnswer, match="is it a Tidewright server"):
            answer.result()
        answer = Background(lambda: client.generate("a"))
        call.say(call.next_request().id, final=True)
        with pytest.raises(Interrupted, match="without its last part"):
            answer.result()


def test_messages_are_made_token_ids_by_the_server(clients: Clients, triton: ScriptedStream) -> None:
    with clients(triton.address) as client:
        chat = [{"role": "user", "content": "Hi"}] * 3
        answer = Background(lambda: client.generate(messages=chat, model="decoder"))
        call = triton.next_call()
        request = call.next_request()
        assert call.tensors(request)["input_ids"] == struct.pack("<3i", 0, 1, 2)
        call.token(request.id, "x", "stop")
        assert answer.result().usage.prompt_tokens == 3
        assert client.tokenize(messages=chat) == [0, 1, 2]


def test_no_server_and_a_server_of_another_kind(clients: Clients) -> None:
    (port,) = free_ports(1)
    with clients(f"127.0.0.1:{port}") as client:
        for use in (lambda: client.generate("a"), lambda: client.generate(messages=[{"role": "user"}])):
            with pytest.raises(ConnectionFailed, match="check host and port"):
                use()
        assert not client.health()
        assert "check host and port" in client.health().trouble
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with clients(f"127.0.0.1:{server.server_port}") as client:
        with pytest.raises(TidewrightError) as failed:
            client.generate("a")
    server.shutdown()
    assert "gRPC port" in str(failed.value)


def test_a_server_with_tls_is_not_asked_in_the_open(clients: Clients) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def alert() -> None:
            connection, _ = listener.accept()
            connection.recv(1)
            connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46")  # of TLS: no such version
            connection.close()

        threading.Thread(target=alert, daemon=True).start()
        with clients(f"127.0.0.1:{listener.getsockname()[1]}") as client, pytest.raises(ConnectionFailed):
            client.generate("a", timeout=5)


def test_a_client_that_nobody_closes_does_not_keep_the_program(triton: ScriptedStream) -> None:
    client = TritonClient(triton.address)
    stream = client.stream("a")
    begun(triton, stream)
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "tidewright-triton")
    client.close()


class Told(Hooks):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_request(self, call: CallInfo) -> None:
        self.told.append(("request", call.operation, call.model, call.is_stream))
        call.headers["traceparent"] = TRACE

    def on_retry(self, call: CallInfo, error: TidewrightError, wait: float) -> None:
        self.told.append(("retry", type(error), call.retries))

    def on_first_token(self, call: CallInfo) -> None:
        self.told.append(("first",))
        raise RuntimeError("a fault of the hook")

    def on_end(self, call: CallInfo, answer: Answer | None, error: TidewrightError | None) -> None:
        self.told.append(("end", answer and (answer.text, answer.finish_reason), type(error)))


def test_hooks_are_told_of_each_generation_once(clients: Clients, triton: ScriptedStream) -> None:
    hooks = Told()
    with clients(triton.address, max_retries=1, hooks=hooks) as client:
        stream = client.stream("a")
        first = Background(lambda: next(stream))
        call = triton.next_call()
        request = call.next_request()
        assert request.parameters["traceparent"].string_param == TRACE
        call.error(request.id, "try again later [overloaded]")
        call.token(call.next_request().id, "one")
        first.result()
        stream.close()
        stream.close()
        call.next_request()  # the cancel
        answer = Background(lambda: client.generate("a"))
        call.error(call.next_request().id, "no [invalid]")
        with pytest.raises(InvalidRequest):
            answer.result()
        client.stream("never read").close()
    assert hooks.told == [
        ("request", "generate", "failsafe", True),
        ("retry", Unavailable, 1),
        ("first",),
        ("end", ("one", None), type(None)),
        ("request", "generate", "failsafe", False),
        ("end", None, InvalidRequest),
    ]


@pytest.mark.parametrize("wrong", [{"max_retries": -1}, {"timeout": 0}, {"idle_timeout": -1}, {"max_buffer_bytes": 0}])
def test_options_out_of_range(clients: Clients, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        clients("127.0.0.1:8001", **wrong)
