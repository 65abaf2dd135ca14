"""Builds an answer from the replies of all generations, whole or as server-sent events. No I/O."""

from __future__ import annotations

from tidewright_gateway.openai.answers import Answer
from tidewright_gateway.replicas.triton import Reply


class WholeAnswer:
    def __init__(self, answer: Answer, num_choices: int) -> None:
        self._answer = answer
        self._choices = [answer.choice(index, is_streamed=False) for index in range(num_choices)]

    def take(self, index: int, reply: Reply) -> None:
        self._choices[index].take(reply)

    def body(self) -> bytes:
        """Once all have ended."""
        return self._answer.whole(self._choices)


class Events:
    """Joins events that are ready together: a write costs more than its content."""

    def __init__(self, answer: Answer, num_choices: int) -> None:
        self._answer = answer
        self._choices = [answer.choice(index, is_streamed=True) for index in range(num_choices)]
        self._has_begun = False
        self._open = num_choices

    @property
    def are_all(self) -> bool:
        """The stream has ended."""
        return not self._open

    def take(self, index: int, reply: Reply) -> bytes:
        """The events for a reply, including the end of the stream after the last one."""
        answer, choice, written = self._answer, self._choices[index], b""
        if not self._has_begun:
            self._has_begun = True
            written = answer.opening(self._choices)
        part = choice.take(reply)
        written += answer.piece(choice, part)
        if choice.finish_reason:
            self._open -= 1
        return written if self._open else written + answer.closing(self._choices)
