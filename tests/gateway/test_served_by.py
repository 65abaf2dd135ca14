"""Every chunk of a stream says who answered, the last one too."""

from __future__ import annotations

import json

from tidewright_gateway.openai.answers import ChatAnswer, Choice, Usage
from tidewright_gateway.replicas.triton import Reply


def served_by(event: bytes) -> str:
    said: str = json.loads(event.removeprefix(b"data: "))["served_by"]
    return said


def test_the_usage_says_who_answered() -> None:
    for models, whole in ((["decoder"], "decoder"), (["fallback"], "fallback"), (["decoder", "fallback"], "fallback")):
        answer, choice = ChatAnswer("1", "model", None, True, [""]), Choice(0)
        for model in models:
            reply = Reply(text="a", token_ids=[1], finish_reason=None, logprobs=None, served_by=model)
            choice.take(reply)
            assert served_by(answer.piece(choice, reply, [])) == model
        assert served_by(answer.usage(Usage(1, 1))) == whole
