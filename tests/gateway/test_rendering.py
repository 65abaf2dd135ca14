"""What is written of a stream, and when."""

from __future__ import annotations

from tidewright.resilience.deadline import Deadline
from tidewright.schema import SamplingParams
from tidewright_gateway.context import RequestContext
from tidewright_gateway.http.tracing import Tracer
from tidewright_gateway.openai.answers import DONE, ChatAnswer
from tidewright_gateway.openai.offsets import Offsets
from tidewright_gateway.openai.rendering import Events
from tidewright_gateway.replicas.failover import Generation
from tidewright_gateway.replicas.triton import Reply


def written(n: int, *replies: tuple[int, bool]) -> list[bytes]:
    """`replies`: index of the choice, and whether it ends."""
    context = RequestContext("id", Tracer(0).begin(()), num_prompt_tokens=1)
    context.generations = [Generation("id", [1], SamplingParams(), Deadline()) for _ in range(n)]
    answer = ChatAnswer("id", "model", None, True, [], lambda index: Offsets(None, []))  # type: ignore[arg-type]
    events, parts = Events(context, answer), []
    for index, ends in replies:
        reply = Reply("word", [1, 2], "length" if ends else None, None)
        context.take(reply)
        parts.append(events.take(index, reply))
    return parts


def test_what_is_there_together_is_written_together() -> None:
    parts = written(1, (0, False), (0, False), (0, True))
    assert [part.count(b"data: ") for part in parts] == [2, 1, 3]  # opening and piece; piece; piece, usage and end
    assert b'"role":"assistant"' in parts[0]
    assert b'"finish_reason":"length"' in parts[-1]
    assert parts[-1].endswith(DONE)


def test_a_choice_that_ends_early_is_not_held_back_for_the_others() -> None:
    parts = written(2, (0, False), (0, True), (1, False), (1, True))
    assert b'"index":0' in parts[0]
    assert b'"index":1' in parts[0]
    assert [part.count(b"data: ") for part in parts] == [3, 1, 1, 3]
