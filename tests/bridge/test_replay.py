"""What happens to requests when their engine dies: replay, trials of suspects, and the end of patience."""

from __future__ import annotations

import pytest

from helpers.scripted import World
from tidewright.bridge.bridge import MAX_FAILED_STARTS
from tidewright.engine.messages import SequenceOutput
from tidewright.errors import EngineUnavailableError


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
    pieces = caller.end()
    assert [piece.finish_reason for piece in pieces] == ["length", "length"]
    for index in range(2):
        assert [token for chunk in caller.chunks for token in chunk.pieces[index].token_ids] == words
        assert "".join(chunk.pieces[index].text for chunk in caller.chunks) == " the sea is wide and blue"
    assert caller.ends == 1


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
