"""Builds the answer from the replies of all generations, whole or as server-sent events. No I/O."""

from __future__ import annotations

from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.answers import DONE, Answer, Choice, Usage
from tidewright_gateway.replicas.triton import Reply


class WholeAnswer:
    def __init__(self, context: RequestContext, answer: Answer) -> None:
        self._context, self._answer = context, answer
        self._choices = [Choice(index, keeps_logprobs=True) for index in range(len(context.generations))]

    def take(self, index: int, reply: Reply) -> None:
        self._choices[index].take(reply)

    def body(self) -> bytes:
        """Once all have ended."""
        return self._answer.whole(self._choices, _usage(self._context), self._context.limited_by)


class Events:
    """Joins events that are ready together: a write costs more than its content."""

    def __init__(self, context: RequestContext, answer: Answer) -> None:
        self._context, self._answer = context, answer
        self._choices = [Choice(index) for index in range(len(context.generations))]
        self._has_begun = False
        self._open = len(self._choices)

    @property
    def are_all(self) -> bool:
        """The stream has ended."""
        return not self._open

    def take(self, index: int, reply: Reply) -> bytes:
        """The events for a reply, including the end of the stream after the last one."""
        answer, choice, written = self._answer, self._choices[index], b""
        if not self._has_begun:
            self._has_begun = True
            written = b"".join(answer.opening(choice.index) for choice in self._choices)
        written += answer.piece(choice, reply, choice.take(reply), self._context.limited_by)
        if choice.finish_reason:
            self._open -= 1
        return written if self._open else written + answer.usage(_usage(self._context)) + DONE


def _usage(context: RequestContext) -> Usage:
    return Usage(context.num_prompt_tokens, context.num_tokens)
