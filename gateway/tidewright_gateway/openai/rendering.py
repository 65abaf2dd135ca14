"""From the replies of a request's generations to its answer, whole or as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from tidewright.resilience.errors import ModelError
from tidewright_gateway.openai.answers import DONE, Answer, Choice, Usage, event
from tidewright_gateway.openai.errors import of_model
from tidewright_gateway.pipeline import Pipeline, RequestContext


async def whole(service: Pipeline, work: RequestContext, answer: Answer) -> bytes:
    """The whole answer; closes the work.

    Raises:
        ApiError: one of its generations failed; the others are given up.
    """
    choices = [Choice(index) for index in range(len(work.tasks))]
    try:
        async with aclosing(service.replies(work)) as replies:
            async for index, reply in replies:
                choices[index].take(reply)
    except ModelError as error:
        raise of_model(error) from None
    finally:
        await service.close(work, _generated(choices))
    return answer.whole(choices, Usage(work.num_prompt_tokens, _generated(choices)))


async def stream(service: Pipeline, work: RequestContext, answer: Answer) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events, several at once where they are: a write costs more than what is written.

    The first says that a replica took the request. Closes the work.

    Raises:
        ApiError: before the first event only; later the error is an event.
    """
    choices = [Choice(index) for index in range(len(work.tasks))]
    began, held = False, b""
    try:
        async with aclosing(service.replies(work)) as replies:
            async for index, reply in replies:
                if not began:
                    began = True
                    held = b"".join(answer.opening(choice.index) for choice in choices)
                choice = choices[index]
                held += answer.piece(choice, reply, choice.take(reply))
                if not all(choice.finish_reason for choice in choices):
                    yield held
                    held = b""
    except ModelError as error:
        if not began:
            raise of_model(error) from None
        yield event(of_model(error).body)
        return
    finally:
        await service.close(work, _generated(choices))
    yield held + answer.usage(Usage(work.num_prompt_tokens, _generated(choices))) + DONE


def _generated(choices: Sequence[Choice]) -> int:
    return sum(choice.num_tokens for choice in choices)
