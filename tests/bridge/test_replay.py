"""Requests whose engine dies (replay, trials of suspects, the end of patience), and those that come with tokens."""

from __future__ import annotations

import msgspec
import pytest

from helpers.scripted import Caller, World
from tidewright.bridge.bridge import MAX_FAILED_STARTS
from tidewright.bridge.text_stream import TextStream
from tidewright.engine.messages import SequenceOutput
from tidewright.errors import EngineUnavailableError
from tidewright.schema import SamplingParams


def test_the_next_engine_goes_on_after_the_last_token(world: World) -> None:
    words = world.ids(" the sea is wide and blue")
    caller = world.submit(stream=True, n=2, prompt_logprobs=0, timeout=1000.0)
    first, second = world.engine.submitted()
    world.engine.says(SequenceOutput(1, words[:2]), SequenceOutput(1, words[2:3]))
    world.engine.dies()
    world.engine.comes_up()
    again = world.engine.submitted()
    assert [message.output_token_ids for message in again] == [words[:3], []]
    assert [message.sampling.seed for message in again] == [first.sampling.seed, second.sampling.seed] == [7, 8]
    assert [message.deadline for message in again] == [first.deadline, second.deadline]
    assert [message.sampling.prompt_logprobs for message in again] == [None, None]
    world.engine.says(SequenceOutput(1, words[3:], "length"), SequenceOutput(2, words, "length"))
    deltas = caller.end()
    assert [delta.finish_reason for delta in deltas] == ["length", "length"]
    for index in range(2):
        assert [token for response in caller.responses for token in response.deltas[index].token_ids] == words
        assert "".join(response.deltas[index].text for response in caller.responses) == " the sea is wide and blue"
    assert caller.ends == 1


def test_an_embedding_is_computed_anew_and_sent_once(world: World) -> None:
    caller = world.submit()
    world.engine.submitted()
    world.engine.dies()
    world.engine.comes_up()
    (again,) = world.engine.submitted()
    world.engine.says(SequenceOutput(again.request_id, [], "stop", embedding=b"1234"))
    world.engine.says(SequenceOutput(again.request_id, [], "stop", embedding=b"5678"))
    (delta,) = caller.end()
    assert (delta.embedding, delta.finish_reason) == (b"1234", "stop")
    world.wait_idle()
    assert (len(caller.responses), caller.ends) == (1, 1)


def test_prompt_logprobs_are_asked_for_again_until_they_came(world: World) -> None:
    world.submit(prompt_logprobs=0)
    world.engine.submitted()
    world.engine.dies()
    world.engine.comes_up()
    assert world.engine.submitted()[0].sampling.prompt_logprobs == 0


def test_between_two_engines_requests_wait_and_can_be_cancelled(world: World) -> None:
    world.engine.dies()
    gone, kept = world.submit(), world.submit()
    gone.cancelled = True
    gone.end()
    world.engine.comes_up()
    assert [message.request_id for message in world.engine.submitted()] == [2]
    world.engine.says(SequenceOutput(2, [5], "length"))
    kept.end()
    world.wait_idle()
    assert world.engine.aborted() == []


def test_an_engine_that_does_not_come_up_again_ends_the_waiting(world: World) -> None:
    callers = [world.submit(n=2), world.submit(stream=True)]
    for _ in range(MAX_FAILED_STARTS):
        world.engine.dies()
        assert not any(caller.ends for caller in callers)
    world.engine.dies()
    for caller in callers:
        caller.end()
        assert isinstance(caller.error, EngineUnavailableError)
        assert f"{MAX_FAILED_STARTS} starts failed" in str(caller.error)
        assert "killed by SIGKILL" in str(caller.error)
    with pytest.raises(EngineUnavailableError, match="killed by SIGKILL"):
        world.submit()
    world.wait_idle()
    assert [caller.ends for caller in callers] == [1, 1]
    world.engine.comes_up()
    world.submit()
    assert [message.request_id for message in world.engine.submitted()] == [5]


def joined(caller: Caller) -> tuple[str, list[int]]:
    """Text and tokens of all responses."""
    deltas = [response.deltas[0] for response in caller.responses]
    return "".join(delta.text for delta in deltas), [token for delta in deltas for token in delta.token_ids]


def test_tokens_that_the_caller_has_go_to_the_engine_and_not_back(world: World) -> None:
    words = world.ids(" the sea is wide and blue")
    for stream in (True, False):
        caller = world.submit(stream=stream, resume_ids=words[:3], max_tokens=6)
        sent = world.engine.submitted()[-1]
        assert (sent.prompt_token_ids, sent.output_token_ids) == ([1, 2, 3], words[:3])
        assert (sent.sampling.seed, sent.sampling.max_tokens) == (7, 6)
        world.engine.says(SequenceOutput(sent.request_id, words[3:5]))
        if stream:
            caller.wait(lambda caller: caller.responses)
        world.engine.says(SequenceOutput(sent.request_id, words[5:], "length"))
        caller.end()
        assert joined(caller) == (" wide and blue", words[3:])
        assert len(caller.responses) == (2 if stream else 1)


def test_the_engine_after_the_next_gets_old_and_new_tokens(world: World) -> None:
    words = world.ids(" the sea is wide and blue")
    caller = world.submit(stream=True, resume_ids=words[:2], timeout=1000.0)
    (first,) = world.engine.submitted()
    world.engine.dies()
    world.engine.comes_up()
    (second,) = world.engine.submitted()
    assert second == msgspec.structs.replace(first, accepted_before=True)
    world.engine.says(SequenceOutput(1, words[2:4]))
    world.engine.dies()
    world.engine.comes_up()
    (third,) = world.engine.submitted()
    assert third.output_token_ids == words[:4]
    assert (third.sampling, third.deadline) == (first.sampling, first.deadline)
    world.engine.says(SequenceOutput(1, words[4:], "length"))
    caller.end()
    assert joined(caller) == (" is wide and blue", words[2:])


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("I love 🍕 and 👩‍👩‍👧‍👦, 今天 and \ufffd too", []),  # characters of several tokens
        (" the sea is wide and blue", ["is wet", "blue as"]),  # held back for a while, and not found
        (" the sea is wide and blue", ["sea is wid"]),
        (" the 🍕 is wide and blue", ["🍕 is wide an"]),
    ],
    ids=["characters", "no stop", "stop", "stop of such characters"],
)
@pytest.mark.parametrize("keeps", [False, True], ids=["", "kept"])
def test_wherever_it_is_cut_the_text_is_the_undisturbed_one(
    world: World, text: str, stop: list[str], keeps: bool
) -> None:
    words = world.ids(text)
    found = [text.index(string) + len(string) * keeps for string in stop if string in text]
    whole = text[: min(found, default=len(text))]
    cuts = 0
    options = {"stop": stop, "include_stop_str_in_output": keeps}
    for cut in range(1, len(words)):
        undisturbed = TextStream(world.tokenizer, [], SamplingParams(**options))
        before = "".join(undisturbed.push(token) for token in words[:cut])
        if undisturbed.stopped_by is not None:
            break
        caller = world.submit(stream=True, resume_ids=words[:cut], **options)
        number = world.engine.submitted()[-1].request_id
        for token in words[cut:-1]:
            world.engine.says(SequenceOutput(number, [token]))
        world.engine.says(SequenceOutput(number, words[-1:], "length"))
        (last,) = caller.end()
        assert before + joined(caller)[0] == whole, cut
        assert last.finish_reason == ("stop" if found else "length")
        cuts += 1
    assert cuts > 2


def test_min_tokens_counts_the_tokens_that_the_caller_has(world: World) -> None:
    words = world.ids(" blue blue blue blue")
    caller = world.submit(resume_ids=words[:2], stop=["blue"], min_tokens=4)
    world.engine.says(SequenceOutput(1, words[2:]))
    (delta,) = caller.end()
    assert (delta.text, delta.token_ids, delta.finish_reason) == (" blue ", words[2:], "stop")


def test_a_timeout_behind_the_callers_tokens_is_an_answer(world: World) -> None:
    words = world.ids("so far x")
    for timeout in (2.0, 0.0):
        caller = world.submit(resume_ids=words, stop=["xyz"], timeout=timeout)
        sent = world.engine.submitted()[-1]
        assert sent.output_token_ids == words
        world.engine.says(SequenceOutput(sent.request_id, [], "timeout", message="while it was queued"))
        # "x" was held back, for it may have begun the stop string.
        assert [(delta.text, delta.token_ids, delta.finish_reason) for delta in caller.end()] == [("x", [], "timeout")]
        assert caller.error is None
    world.wait_idle()
    assert world.bridge.request_stats.read_finished()["timeout"] == 2
