"""The state of a session: no I/O, so every order of messages and breaks can be had."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tidewright_client import ConnectionFailed, Finish, Text, TidewrightError, UnexpectedAnswer, settings
from tidewright_client.requests import Request
from tidewright_client.sessions.core import GenerationState, SessionCore


def session() -> SessionCore:
    """Open."""
    one = SessionCore(settings.make("http://h", None, 0, None, 1, 10**6, None))
    tell(one, "opened", resume_grace=1)
    return one


def tell(one: SessionCore, type: str, **fields: Any) -> list[dict[str, Any]]:
    return [json.loads(message) for message in one.receive(json.dumps({"type": type, **fields}))]


def begun(one: SessionCore, credits: int = 4) -> GenerationState:
    generation = one.begin(Request("complete", "", {"prompt": "x"}), credits)
    tell(one, "started", id=generation.id, request_id="r", resume_token="t")
    return generation


def token(one: SessionCore, seq: int, text: str) -> list[dict[str, Any]]:
    return tell(one, "token", id="1", index=0, seq=seq, text=text, token_ids=[7])


def test_a_token_that_comes_twice_counts_once() -> None:
    one = session()
    generation = begun(one)
    for seq, text in ((1, "a"), (2, "b"), (1, "a"), (2, "b"), (3, "c")):
        token(one, seq, text)
    assert [event for event, _ in generation.events] == [Text("a"), Text("b"), Text("c")]


def test_a_resume_asks_for_what_is_missing_and_grants_what_is_free() -> None:
    one = session()
    generation = begun(one)
    for seq in (1, 2, 3):
        token(one, seq, "x")
    generation.take()
    assert one.lost(None, ConnectionFailed("it broke")) == 0.0  # at once
    assert generation.grant() is None  # over no connection
    (message,) = tell(one, "opened", resume_grace=1)
    assert message == {
        "type": "resume", "id": "1", "resume_token": "t", "received": [3], "credits": 2,
    }  # fmt: skip
    tell(one, "started", id="1", request_id="r", resume_token="t")
    generation.take()
    assert generation.grant() is None  # that of before the break is in the resume
    generation.take()
    assert json.loads(generation.grant() or "") == {"type": "credit", "id": "1", "tokens": 2}


def test_tokens_without_text_are_granted_at_once() -> None:
    one = session()
    begun(one)
    assert token(one, 1, "") == []
    assert token(one, 2, "") == [{"type": "credit", "id": "1", "tokens": 2}]


def test_one_that_had_not_started_is_asked_for_again() -> None:
    one = session()
    one.begin(Request("complete", "", {"prompt": "x"}, timeout=None), 4)
    one.lost(None, ConnectionFailed("it broke"))
    (message,) = tell(one, "opened", resume_grace=1)
    assert message == {"type": "generate", "id": "1", "request": {"prompt": "x"}, "credits": 4}


def test_an_end_before_its_tokens_is_no_end() -> None:
    one = session()
    generation = begun(one)
    token(one, 1, "a")
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    tell(one, "done", id="1", choices=[{"index": 0, "seq": 2, "finish_reason": "stop"}], usage=usage)
    assert not any(isinstance(event, Finish) for event, _ in generation.events)
    assert type(generation.error).__name__ == "Interrupted"
    assert not one.live


def test_connections_that_bring_nothing_are_not_made_at_once() -> None:
    one = session()
    begun(one)
    waits = []
    for _ in range(6):
        waits.append(one.lost(None, ConnectionFailed("it broke")))
        tell(one, "opened", resume_grace=1000)
    assert waits[0] == 0
    assert all(wait is not None and 0 < wait <= 1 for wait in waits[1:])


def test_a_late_credit_or_cancel_does_no_harm() -> None:
    one = session()
    generation = begun(one)
    tell(one, "error", status=404, code="unknown_id", message="no generation '1' runs", id="1", param="id")
    assert not generation.is_over
    tell(one, "error", status=404, code="unknown_id", message="no generation '9' runs", id="9", param="id")
    tell(one, "something_new", id="1")
    assert not generation.is_over


def test_a_message_that_can_not_be_read_ends_what_runs() -> None:
    token = '{"type": "token", "id": "1", "seq": 1e999, "text": "", "token_ids": []}'  # beyond all numbers
    messages = ("{", "[]", '{"type": "done", "id": "1"}', '{"type": "token", "id": "1"}', '{"type": "opened"}', token)
    for message in messages:
        one = session()
        generation = one.begin(Request("complete", "", {"prompt": "x"}), 1)
        with pytest.raises(UnexpectedAnswer) as caught:
            one.receive(message)
        one.give_up(caught.value)
        assert isinstance(generation.error, TidewrightError)
        assert not one.live
