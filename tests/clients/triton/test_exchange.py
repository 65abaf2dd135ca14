"""What becomes of the requests on a stream, whatever comes over it and in whichever order."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from helpers.scripted_stream import texts
from tidewright_client.errors import (
    ConnectionFailed,
    Interrupted,
    InvalidRequest,
    TidewrightError,
    Unavailable,
    UnexpectedAnswer,
)
from tidewright_client.triton import wire
from tidewright_client.triton.exchange import END_PATIENCE, LINGER, MAX_AGE, Exchange, Line, Step


def said(request_id: str, text: str = "", error: str = "", final: bool = False) -> service_pb2.ModelStreamInferResponse:
    response = service_pb2.ModelStreamInferResponse(error_message=error)
    response.infer_response.id = request_id
    response.infer_response.parameters["triton_final_response"].bool_param = final
    if text:
        response.infer_response.outputs.add(name="text_output")
        response.infer_response.raw_output_contents.append(texts(text))
    return response


class World:
    def __init__(self) -> None:
        self.line, self.woken = Line(0.0), 0

    def begin(self, request_id: str, max_buffer: int = 1 << 20, now: float = 0.0) -> Exchange:
        def wake() -> None:
            self.woken += 1

        exchange = Exchange(request_id, "decoder", max_buffer, wake)
        self.line.begin(exchange, wire.request_of("decoder", request_id, wire.text_input("a")), now)
        return exchange

    def sent(self) -> list[str]:
        """The prompts and control words that wait to be sent."""
        found = [request.raw_input_contents[0][4:].decode() for request in self.line.outbox]
        self.line.outbox.clear()
        return found


def texts_of(exchange: Exchange, into: list[str] | None = None) -> list[str]:
    found = [] if into is None else into
    while exchange.has_news and (reply := exchange.next()):
        found.append(wire.text_of(reply))
    return found


def error_of(exchange: Exchange) -> TidewrightError:
    with pytest.raises(TidewrightError) as caught:
        texts_of(exchange)
    return caught.value


def test_replies_find_their_request() -> None:
    world = World()
    one, two = world.begin("1"), world.begin("2")
    for request_id, text in (("1", "a"), ("2", "x"), ("1", "b"), ("nobody", "?")):
        world.line.hear(said(request_id, text), 1.0)
    world.line.hear(said("1", "c", final=True), 1.0)
    assert (texts_of(one), one.is_over) == (["a", "b", "c"], True)
    assert (texts_of(two), two.is_over) == (["x"], False)
    assert world.woken == 4
    world.line.hear(said("2", final=True), 1.0)  # Triton's empty final response
    assert (texts_of(two), two.next()) == ([], None)
    assert world.line.is_empty is False
    assert world.sent() == ["a", "a"]
    assert world.line.is_empty


def test_an_error_ends_only_its_request_after_what_came_before() -> None:
    world = World()
    one, two = world.begin("1"), world.begin("2")
    world.line.hear(said("1", "a"), 1.0)
    world.line.hear(said("1", error="max_tokens is 0 [invalid]"), 1.0)
    assert wire.text_of(one.next()) == "a"  # type: ignore[arg-type]
    error = error_of(one)
    assert (type(error), error.code, error.request_id, str(error)) == (
        InvalidRequest,
        "invalid",
        "1",
        "max_tokens is 0",
    )
    assert not two.has_news
    assert not world.line.has("1")


def test_an_error_without_an_id_lets_nobody_wait_for_ever() -> None:
    world = World()
    one, two = world.begin("1"), world.begin("2")
    world.line.hear(said("2", "x"), 1.0)
    world.line.hear(said("", error="a fault"), 1.0)
    assert isinstance(error_of(one), UnexpectedAnswer)
    assert wire.text_of(two.next()) == "x"  # type: ignore[arg-type]
    assert isinstance(error_of(two), Interrupted)
    assert not world.line.takes_requests


def test_a_broken_stream_interrupts_what_had_begun() -> None:
    world = World()
    begun, waiting, done = world.begin("1"), world.begin("2"), world.begin("3")
    world.line.hear(said("1", "a"), 1.0)
    world.line.hear(said("3", "whole", final=True), 1.0)
    world.line.broke(ConnectionFailed("gone"))
    assert texts_of(done) == ["whole"]
    assert isinstance(error_of(waiting), ConnectionFailed)
    begun.next()
    error = error_of(begun)
    assert (type(error), str(error)) == (
        Interrupted,
        "the answer was cut off: gone; ask again; partial has what came",
    )


def test_who_leaves_is_cancelled_by_id_and_heard_no_more() -> None:
    world = World()
    one = world.begin("1")
    world.line.hear(said("1", "a"), 1.0)
    world.sent()
    world.line.leave(one, 1.0)
    world.line.leave(one, 1.0)
    assert world.sent() == ["cancel:1"]
    woken = world.woken
    world.line.hear(said("1", "b"), 1.5)
    world.line.hear(said("1", error="cancelled by its id [cancelled]"), 2.0)
    assert (texts_of(one), one.error, world.woken) == (["a"], None, woken)
    world.line.hear(said("1.cancel1", "ok", final=True), 2.0)
    assert world.line.is_empty


def test_what_has_ended_is_not_cancelled() -> None:
    world = World()
    one = world.begin("1")
    world.line.hear(said("1", "a", final=True), 1.0)
    world.sent()
    world.line.leave(one, 1.0)
    assert world.sent() == []


def test_a_reader_who_is_too_slow_loses_its_request_and_keeps_what_fits() -> None:
    world = World()
    slow, other = world.begin("1", max_buffer=200), world.begin("2")
    world.sent()
    for number in range(100):
        world.line.hear(said("1", f"{number}"), 1.0)
    world.line.hear(said("2", "x"), 1.0)
    assert world.sent() == ["cancel:1"]
    found: list[str] = []
    with pytest.raises(Interrupted, match="more than 200 bytes"):
        texts_of(slow, found)
    assert 1 <= len(found) < 20
    assert texts_of(other) == ["x"]


def test_a_reader_who_keeps_up_has_no_limit() -> None:
    world = World()
    one = world.begin("1", max_buffer=200)
    for number in range(100):
        world.line.hear(said("1", f"{number}"), 1.0)
        assert texts_of(one) == [f"{number}"]


def test_an_idle_stream_is_closed_and_a_busy_one_ages() -> None:
    """An open stream keeps Triton from unloading its models."""
    world = World()
    assert world.line.step(LINGER / 2) is Step.GO_ON
    assert world.line.step(LINGER) is Step.CLOSE
    assert not world.line.takes_requests
    busy = World()
    busy.begin("1", now=1.0)
    assert busy.line.step(MAX_AGE - 1) is Step.GO_ON
    assert busy.line.takes_requests
    assert busy.line.step(MAX_AGE) is Step.GO_ON
    assert not busy.line.takes_requests  # nothing new, and what runs ends
    busy.line.hear(said("1", "a", final=True), MAX_AGE + 5)
    assert busy.line.step(MAX_AGE + 5) is Step.CLOSE


def test_a_cancel_that_nobody_obeys_ends_the_stream_when_it_hurts_nobody() -> None:
    world = World()
    hung, other = world.begin("1"), world.begin("2")
    world.line.leave(hung, 1.0)
    assert world.line.step(END_PATIENCE) is Step.GO_ON
    assert world.line.takes_requests
    assert world.line.step(END_PATIENCE + 2) is Step.GO_ON
    assert not world.line.takes_requests
    world.line.hear(said("2", "x", final=True), END_PATIENCE + 3)
    assert world.line.step(END_PATIENCE + 4) is Step.CANCEL
    assert texts_of(other) == ["x"]


def test_silence_of_one_says_nothing_of_a_connection_that_others_hear() -> None:
    for others_hear in (True, False):
        world = World()
        silent = world.begin("1")
        world.begin("2")
        if others_hear:
            world.line.hear(said("2", "x"), 30.0)
        world.sent()
        world.line.silent(silent, 60.0)
        assert world.line.takes_requests is others_hear
        assert world.sent() == ["cancel:1"]


@pytest.mark.parametrize("seed", range(20))
def test_each_request_ends_once_whatever_comes(seed: int) -> None:
    rng, world, ends = random.Random(seed), World(), dict[str, Any]()
    exchanges = {str(number): world.begin(str(number), max_buffer=300) for number in range(6)}
    for _ in range(200):
        name = rng.choice(list(exchanges))
        exchange = exchanges[name]
        match rng.choice(["text"] * 6 + ["error", "final", "read", "read", "leave"]):
            case "text":
                world.line.hear(said(name, "t"), 1.0)
            case "error":
                world.line.hear(said(name, error="late [engine_failed]"), 1.0)
            case "final":
                world.line.hear(said(name, "t", final=True), 1.0)
            case "leave":
                world.line.leave(exchange, 1.0)
            case _ if exchange.has_news and name not in ends:
                try:
                    if exchange.next() is None:
                        ends[name] = None
                except TidewrightError as error:
                    ends[name] = type(error)
    world.line.broke(None)
    assert world.line.is_empty
    for name, exchange in exchanges.items():
        if exchange.is_left_at is None and name not in ends:
            assert exchange.has_news
        if name in ends:
            assert ends[name] in (None, Unavailable, Interrupted)
