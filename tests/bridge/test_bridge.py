"""Requests of one and of many sequences between a scripted engine and recording callers."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from helpers.scripted import PATIENCE, Caller, World
from tidewright.bridge.response import Response
from tidewright.engine.messages import (
    SequenceOutput,
    TokenLogprob,
)
from tidewright.errors import (
    CancelledError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    RequestError,
    TimedOutError,
)
from tidewright.schema import ATTEMPT

EOS = 2


def entry(token_id: int, logprob: float) -> list[TokenLogprob]:
    return [TokenLogprob(token_id, logprob, 1)]


def test_n_sequences_are_n_requests_of_the_engine_and_one_answer(world: World) -> None:
    caller = world.submit(n=3, seed=2**63 - 2, echo="Say: ")
    sent = world.engine.submitted()
    assert [message.request_id for message in sent] == [1, 2, 3]
    assert [message.sampling.seed for message in sent] == [2**63 - 2, 2**63 - 1, 0]
    assert all(message.prompt_token_ids == [1, 2, 3] for message in sent)
    a, b, c = [*world.ids(" one"), EOS], world.ids(" two more"), [*world.ids(" three"), EOS]
    world.engine.says(SequenceOutput(2, b, "length", [entry(token, -1.0) for token in b]))
    world.engine.says(SequenceOutput(3, c, "stop", [entry(token, -0.5) for token in c]))
    world.engine.says(SequenceOutput(1, a, "stop", [entry(token, -0.25) for token in a]))
    deltas = caller.end()
    assert [delta.text for delta in deltas] == ["Say:  one", "Say:  two more", "Say:  three"]
    assert [delta.token_ids for delta in deltas] == [a, b, c]
    assert [delta.finish_reason for delta in deltas] == ["stop", "length", "stop"]
    assert [len(delta.logprobs) for delta in deltas] == [len(a), len(b), len(c)]
    assert [delta.cumulative_logprob for delta in deltas] == [-0.25 * len(a), -1.0 * len(b), -0.5 * len(c)]
    world.wait_idle()
    assert (caller.ends, len(caller.responses)) == (1, 1)
    assert world.engine.aborted() == []
    assert world.bridge.request_stats.read_finished()["length"] == 1  # one request: the reason that weighs most


def test_streamed_responses_have_an_element_for_each_sequence(world: World) -> None:
    caller = world.submit(n=2, stream=True)
    one, two = [*world.ids(" one")[:1], EOS], world.ids(" two")[:1]
    world.engine.says(SequenceOutput(2, two, None, [entry(two[0], -1.0)]))
    caller.wait(lambda caller: len(caller.responses) == 1)
    world.engine.says(SequenceOutput(2, two, "length", [entry(two[0], -1.0)]))
    caller.wait(lambda caller: len(caller.responses) == 2)
    world.engine.says(SequenceOutput(1, one, "stop", [entry(token, -1.0) for token in one]))
    caller.end()
    seen = [
        [(delta.text, delta.token_ids, delta.finish_reason, delta.cumulative_logprob) for delta in response.deltas]
        for response in caller.responses
    ]
    assert seen == [
        [("", [], None, 0.0), (" two", two, None, -1.0)],
        [("", [], None, 0.0), (" two", two, "length", -2.0)],
        [(" one", one, "stop", -2.0), ("", [], "length", -2.0)],
    ]


def test_a_stop_string_ends_one_sequence_and_only_its_engine_request(world: World) -> None:
    caller = world.submit(n=2, stop=["END"])
    text, late = world.ids("some END"), world.ids(" late")
    world.engine.says(SequenceOutput(1, text), SequenceOutput(1, late))
    deadline = time.monotonic() + PATIENCE
    while world.engine.aborted() != [1] and time.monotonic() < deadline:
        time.sleep(0.002)
    assert world.engine.aborted() == [1]
    assert caller.ends == 0
    world.engine.says(SequenceOutput(1, late), SequenceOutput(2, world.ids("free"), "length"))
    assert [(delta.text, delta.finish_reason) for delta in caller.end()] == [("some ", "stop"), ("free", "length")]
    assert caller.responses[0].deltas[0].token_ids == text
    world.wait_idle()
    assert world.engine.aborted() == [1]


@pytest.mark.parametrize(
    ("sampling", "end", "text"),
    [
        ({}, " END", "some"),
        ({"include_stop_str_in_output": True}, " END", "some END"),
        ({"skip_special_tokens": False}, "<|im_end|>", "some"),
        ({"include_stop_str_in_output": True}, "<|im_end|>", "some"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "<|im_end|>", "some<|im_end|>"),
    ],
)
def test_the_text_of_the_token_that_ends_it_is_left_out_unless_asked_for(
    world: World, sampling: dict[str, Any], end: str, text: str
) -> None:
    for stream in (False, True):
        caller, ids = world.submit(stream=stream, **sampling), [*world.ids("some"), world.ids(end)[0]]
        world.engine.says(SequenceOutput(world.engine.submitted()[-1].request_id, ids, "stop"))
        (delta,) = caller.end()
        assert (delta.text, delta.token_ids, delta.finish_reason) == (text, ids, "stop")


def test_stop_reasons(world: World) -> None:
    words, comma = world.ids("so it goes"), world.ids(",")
    asked = {"stop": ["it"], "stop_token_ids": [EOS, *comma]}
    for sampling, ids, end, reason in (
        (asked, words, None, "it"),
        (asked, [*words[:1], *comma], "stop", comma[0]),
        (asked, [*words[:1], EOS], "stop", EOS),
        ({}, [*words, EOS], "stop", None),
        (asked, words[:1], "length", None),
        (asked, [*words[:1], *world.ids(" i")], "length", None),
    ):
        for stream in (False, True):
            caller = world.submit(stream=stream, **sampling)
            number = world.engine.submitted()[-1].request_id
            for token_id in ids[:-1]:
                world.engine.says(SequenceOutput(number, [token_id]))
            world.engine.says(SequenceOutput(number, ids[-1:], end))  # type: ignore[arg-type]
            (delta,) = caller.end()
            assert (delta.finish_reason, delta.stop_reason) == (end or "stop", reason)


def test_what_is_told_of_the_prompt_comes_with_the_first_tokens_of_the_first_sequence(world: World) -> None:
    caller = world.submit(n=2, stream=True)
    world.engine.says(SequenceOutput(2, [5], cached_tokens=32))
    caller.wait(lambda caller: len(caller.responses) == 1)
    world.engine.says(SequenceOutput(1, [5], cached_tokens=16))
    caller.wait(lambda caller: len(caller.responses) == 2)
    world.engine.says(SequenceOutput(1, [5], "length"), SequenceOutput(2, [5], "length"))
    caller.end()
    assert [response.num_cached_tokens for response in caller.responses][:3] == [None, 16, None]


def test_a_special_token_within_the_text_is_shown_where_asked_for(world: World) -> None:
    ids = world.ids("one<|im_start|>two")
    for skip, text in ((True, "onetwo"), (False, "one<|im_start|>two")):
        caller = world.submit(skip_special_tokens=skip)
        world.engine.says(SequenceOutput(world.engine.submitted()[-1].request_id, ids, "length"))
        assert [delta.text for delta in caller.end()] == [text]


def test_a_cancel_ends_all_sequences_with_one_answer(world: World) -> None:
    caller = world.submit(n=3, stream=True)
    world.engine.says(SequenceOutput(2, world.ids("two"), "length"))
    caller.wait(lambda caller: caller.responses)
    caller.cancelled = True
    caller.end()
    assert isinstance(caller.error, CancelledError)
    world.wait_idle()
    assert world.engine.aborted() == [1, 3]
    world.engine.says(SequenceOutput(1, world.ids("late"), "length"))
    assert caller.ends == 1
    assert world.bridge.request_stats.read_finished()["cancelled"] == 1


@pytest.mark.parametrize(
    ("reason", "message", "error", "said"),
    [
        ("invalid", "too long for the cache", InvalidRequestError, "too long for the cache"),
        ("invalid", "", InvalidRequestError, "refused"),
        ("overloaded", "7 requests wait", OverloadedError, "7 requests wait"),
        ("engine_failed", "", EngineUnavailableError, "engine_failed"),
    ],
)
def test_what_the_engine_refuses_ends_all_with_its_message(
    world: World, reason: Any, message: str, error: type[RequestError], said: str
) -> None:
    caller = world.submit(n=2)
    world.engine.says(SequenceOutput(2, [], reason, message=message))
    caller.end()
    assert type(caller.error) is error
    assert said in str(caller.error)
    world.wait_idle()
    assert world.engine.aborted() == [1]
    assert world.bridge.request_stats.read_finished()[reason] == 1


def test_the_limit_counts_sequences(world: World) -> None:
    first = world.submit(n=4)
    with pytest.raises(OverloadedError, match=r"4 requests are running or waiting.* allow 5"):
        world.submit(n=2)
    last = world.submit()
    with pytest.raises(OverloadedError):
        world.submit()
    with pytest.raises(InvalidRequestError, match="n is 6"):
        world.submit(n=6)
    assert world.bridge.active == 2
    world.engine.says(*(SequenceOutput(i, [5], "length") for i in (1, 2)))  # two of the first one's end
    deadline = time.monotonic() + PATIENCE
    while len(world.bridge._in_flight.sequences) > 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    world.submit(n=2)
    assert first.ends == last.ends == 0


def test_deadlines_are_arrival_plus_timeout_for_every_sequence(world: World) -> None:
    before = time.monotonic()
    world.submit(n=2, timeout=30.0)
    after = time.monotonic()
    world.submit()
    one, two, without = world.engine.submitted()
    assert one.deadline is not None
    assert before + 30 <= one.deadline <= after + 30
    assert two.deadline == one.deadline
    assert without.deadline is None


def test_a_timeout_before_the_first_token_is_an_error(world: World) -> None:
    caller = world.submit(n=2, timeout=2.0)
    world.engine.says(SequenceOutput(1, [], "timeout"))
    world.engine.says(SequenceOutput(2, [], "timeout"))
    caller.end()
    assert isinstance(caller.error, TimedOutError)
    assert str(caller.error).startswith("timed out after 2 s while queued")
    told = world.submit(timeout=2.0)
    world.engine.says(SequenceOutput(3, [], "timeout", message="while its prompt was computed"))
    told.end()
    assert str(told.error) == "while its prompt was computed"
    world.wait_idle()
    assert world.bridge.request_stats.read_finished()["timeout"] == 2
    assert world.engine.aborted() == []


def test_a_timeout_after_tokens_is_an_answer(world: World) -> None:
    plain, many = world.submit(timeout=2.0, stop=["xyz"]), world.submit(n=2, timeout=2.0)
    text = world.ids("so far x")  # "x" is held back, for it may begin the stop string
    world.engine.says(SequenceOutput(1, text), SequenceOutput(2, [*world.ids("a"), EOS], "stop"))
    world.engine.says(SequenceOutput(1, [], "timeout"), SequenceOutput(3, [], "timeout"))
    assert [(delta.text, delta.finish_reason) for delta in plain.end()] == [("so far x", "timeout")]
    assert [(delta.text, delta.finish_reason) for delta in many.end()] == [("a", "stop"), ("", "timeout")]
    world.wait_idle()
    assert world.bridge.request_stats.read_finished()["timeout"] == 2


def test_a_timeout_of_zero_never_reaches_the_engine(world: World) -> None:
    with pytest.raises(TimedOutError, match="timeout is 0 s"):
        world.submit(timeout=0.0)
    assert world.engine.sent == []
    assert world.bridge.active == 0


@pytest.mark.parametrize("stream", [True, False])
def test_prompt_logprobs_come_once_and_are_asked_of_one_sequence(world: World, stream: bool) -> None:
    caller = world.submit(n=2, stream=stream, prompt_logprobs=0)
    assert [message.sampling.prompt_logprobs for message in world.engine.submitted()] == [0, None]
    prompt = [entry(2, -3.0), entry(3, -4.0)]
    world.engine.says(SequenceOutput(1, world.ids(" a"), None, prompt_logprobs=prompt))
    if stream:
        caller.wait(lambda caller: caller.responses)
    world.engine.says(SequenceOutput(1, world.ids(" b"), "length"), SequenceOutput(2, world.ids(" c"), "length"))
    caller.end()
    assert [response.prompt_logprobs for response in caller.responses] == ([prompt, None] if stream else [prompt])


def test_a_cancel_by_id_ends_all_of_that_id_and_no_other(world: World) -> None:
    doomed = [world.submit(client_id="a", stream=True) for _ in range(2)]
    other, nameless = world.submit(client_id="b"), world.submit()
    world.engine.says(SequenceOutput(1, world.ids("one")))
    assert world.bridge.cancel("a") == 2
    for caller in doomed:
        caller.end()
        assert isinstance(caller.error, CancelledError)
    assert sorted(world.engine.aborted()) == [1, 2]
    assert world.bridge.cancel("c") == 0
    for request_id, caller in ((3, other), (4, nameless)):
        world.engine.says(SequenceOutput(request_id, world.ids("done"), "length"))
        caller.end()
        assert caller.error is None
    assert world.bridge.cancel("a") == 0


def test_a_cancel_ends_one_attempt_at_a_request_or_all(world: World) -> None:
    first, second = f"a{ATTEMPT}1.1", f"a{ATTEMPT}2.1"
    callers = {name: world.submit(client_id=name) for name in (first, second, "a", f"ab{ATTEMPT}3.1")}
    assert [world.bridge.cancel(name) for name in (f"a{ATTEMPT}1", "b", ATTEMPT)] == [0, 0, 0]
    assert world.bridge.cancel(first) == 1
    callers[first].end()
    world.engine.says(SequenceOutput(1, world.ids("late")))
    assert [caller.ends for caller in callers.values()] == [1, 0, 0, 0]
    deadline = time.monotonic() + PATIENCE
    while world.bridge.active > 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    assert world.bridge.cancel("a") == 2
    for name in (second, "a"):
        callers[name].end()
        assert isinstance(callers[name].error, CancelledError)
    world.engine.says(SequenceOutput(4, world.ids("done"), "length"))
    assert callers[f"ab{ATTEMPT}3.1"].end()[0].text == "done"
    world.wait_idle()
    assert world.engine.aborted() == [1, 2, 3]


def test_log_lines_have_the_callers_id_and_the_attempt_beside_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    for number, client_id in enumerate(("a", f"b{ATTEMPT}3.1", f"{ATTEMPT}4.2"), 1):
        caller = world.submit(client_id=client_id)
        world.engine.says(SequenceOutput(number, world.ids("done"), "length"))
        caller.end()
    world.wait_idle()
    for event in ("request_received", "request_ended"):
        told = [record.fields for record in caplog.records if getattr(record, "event", "") == event]  # type: ignore[attr-defined]
        assert [(one["request_id"], one["attempt"]) for one in told] == [("a", None), ("b", "3.1"), (None, "4.2")]
    assert ATTEMPT not in caplog.text


def test_a_cancel_noticed_while_the_last_response_goes_out_is_no_second_end(world: World) -> None:
    class Slow(Caller):
        asked, answer = threading.Event(), threading.Event()

        def is_cancelled(self) -> bool:
            self.asked.set()
            self.answer.wait(PATIENCE)
            return True

    caller = Slow()
    world.submit_for(caller)
    assert caller.asked.wait(PATIENCE)
    world.engine.says(SequenceOutput(1, [5], "length"))
    caller.end()
    world.wait_idle()
    caller.answer.set()
    other = world.submit()  # goes through the sender after whatever the canceller has left there
    world.engine.says(SequenceOutput(2, [5], "length"))
    other.end()
    world.bridge.stop()
    assert caller.ends == 1
    assert caller.error is None


def test_a_response_that_fails_is_one_error_and_the_sender_lives(world: World) -> None:
    class Broken(Caller):
        def send(self, response: Response, final: bool) -> None:
            raise RuntimeError("no memory")

    caller = Broken()
    world.submit_for(caller, n=2, stream=True)
    world.engine.says(SequenceOutput(1, [5]))
    caller.end()
    assert "could not be made" in str(caller.error)
    world.wait_idle()
    assert world.engine.aborted() == [1, 2]
    other = world.submit()
    world.engine.says(SequenceOutput(3, [5], "length"))
    assert other.end()
