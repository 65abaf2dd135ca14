"""From a request of the API to its generations, and from their replies to the answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import msgspec

from tidewright.failsafe.models import ModelError
from tidewright.resilience.deadline import Deadline
from tidewright.schema import SamplingParams
from tidewright.tokenization import InvalidPromptError, Tokenizer
from tidewright_gateway.answers import DONE, Answer, Choice, Usage, event
from tidewright_gateway.cluster import Cluster, Task
from tidewright_gateway.errors import ApiError, invalid, of_model
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.protocol import Message
from tidewright_gateway.triton import Reply

LONG_TEXT = 16_384  # characters; tokenizing more would hold up everybody, so a thread does it


@dataclass
class Work:
    """The generations of one request."""

    tasks: list[Task]
    usage_prompt: int
    arrived_at: float  # time.monotonic()


class Prompts:
    """Text and chats to token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    async def of_chat(self, messages: Sequence[Message]) -> list[int]:
        turns = [{"role": message.role, "content": message.text} for message in messages]
        length = sum(len(turn["content"]) for turn in turns)
        if length <= LONG_TEXT:
            return self._run(partial(self.tokenizer.encode_messages, turns), "messages")
        return await asyncio.to_thread(
            self._run, lambda: self._encode_long(self.tokenizer.apply_chat_template(turns), False), "messages"
        )

    async def of_text(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            if len(prompt) <= LONG_TEXT:
                return self._run(partial(self.tokenizer.encode, prompt), "prompt")
            return await asyncio.to_thread(self._run, partial(self._encode_long, prompt, True), "prompt")
        if not prompt:
            raise invalid("prompt has no tokens; send at least one", "prompt")
        limit = self.tokenizer.backend.get_vocab_size()
        if not all(0 <= token_id < limit for token_id in prompt):
            raise invalid(f"prompt: token ids must be from 0 to {limit - 1}", "prompt")
        return prompt

    def _encode_long(self, text: str, add_special_tokens: bool) -> list[int]:
        """As Tokenizer has it, but a batch: for a single text, tokenizers holds the GIL to the end."""
        (encoding,) = self.tokenizer.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if not encoding.ids:
            raise InvalidPromptError("the prompt has no character that the model's vocabulary can express")
        token_ids: list[int] = encoding.ids
        return token_ids

    def _run(self, encode: Callable[[], list[int]], param: str) -> list[int]:
        try:
            return encode()
        except InvalidPromptError as error:
            raise ApiError(422, str(error), code="invalid_prompt", param=param) from None


def make_work(
    request_id: str,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    n: int,
    *,
    max_model_len: int,
    longest: float,
    arrived_at: float,
) -> Work:
    """`n` generations of each prompt; the same seed, one more for each of them. `longest`: seconds for all.

    Raises:
        ApiError: a prompt is too long.
    """
    for prompt in prompts:
        if len(prompt) >= max_model_len:
            message = f"the prompt has {len(prompt)} tokens; with its answer the model's context takes {max_model_len}"
            raise invalid(message, code="context_length_exceeded")
    seed = sampling.seed
    if seed is None and sampling.temperature > 0:
        seed = secrets.randbits(62)  # so that another replica can go on as this one would have
    limit = longest if sampling.timeout is None else min(sampling.timeout, longest)
    deadline = Deadline.after(limit, arrived_at)
    tasks: list[Task] = []
    for prompt in prompts:
        for number in range(n):
            own = sampling if seed is None else msgspec.structs.replace(sampling, seed=(seed + number) % 2**63)
            tasks.append(Task(f"{request_id}-{len(tasks)}", prompt, own, deadline, sampling.logprobs is not None))
    return Work(tasks, sum(map(len, prompts)), arrived_at)


class Generator:
    def __init__(self, cluster: Cluster, metrics: Metrics) -> None:
        self._cluster, self._metrics = cluster, metrics

    async def whole(self, work: Work, answer: Answer) -> bytes:
        """The whole answer.

        Raises:
            ApiError: one of its generations failed; the others are given up.
        """
        choices = [Choice(index) for index in range(len(work.tasks))]
        jobs = [asyncio.ensure_future(self._collect(*pair, work)) for pair in zip(work.tasks, choices, strict=True)]
        try:
            await asyncio.gather(*jobs)
        except ModelError as error:
            raise of_model(error) from None
        finally:
            for job in jobs:
                job.cancel()
        return answer.whole(choices, self._usage(work, choices))

    async def stream(self, work: Work, answer: Answer) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. The first says that a replica took the request.

        Raises:
            ApiError: before the first event only; later the error is an event.
        """
        choices = [Choice(index) for index in range(len(work.tasks))]
        began = False
        try:
            async with aclosing(self._merged(work)) as replies:
                async for index, reply in replies:
                    if not began:
                        began = True
                        for choice in choices:
                            if opening := answer.opening(choice.index):
                                yield opening
                    choice = choices[index]
                    yield answer.piece(choice, reply, choice.take(reply))
        except ModelError as error:
            if not began:
                raise of_model(error) from None
            yield event(of_model(error).body)
            return
        finally:
            usage = self._usage(work, choices)
        if ending := answer.usage(usage):
            yield ending
        yield DONE

    async def _collect(self, task: Task, choice: Choice, work: Work) -> None:
        async with aclosing(self._timed(task, work)) as replies:
            async for reply in replies:
                choice.take(reply)

    async def _timed(self, task: Task, work: Work) -> AsyncGenerator[Reply, None]:
        is_first = True
        self._metrics.asked(time.monotonic() - work.arrived_at)
        async with aclosing(self._cluster.generate(task)) as replies:
            async for reply in replies:
                if is_first and reply.token_ids:
                    is_first = False
                    self._metrics.first_token(time.monotonic() - work.arrived_at)
                yield reply

    async def _merged(self, work: Work) -> AsyncGenerator[tuple[int, Reply], None]:
        """Replies of all generations as they come, each with its index."""
        if len(work.tasks) == 1:
            async with aclosing(self._timed(work.tasks[0], work)) as replies:
                async for reply in replies:
                    yield 0, reply
            return
        arrived: asyncio.Queue[tuple[int, Reply] | Exception | None] = asyncio.Queue(maxsize=len(work.tasks))

        async def forward(index: int) -> None:
            try:
                async with aclosing(self._timed(work.tasks[index], work)) as replies:
                    async for reply in replies:
                        await arrived.put((index, reply))
                await arrived.put(None)
            except Exception as error:
                await arrived.put(error)

        jobs = [asyncio.create_task(forward(index)) for index in range(len(work.tasks))]
        running = len(jobs)
        try:
            while running:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    def _usage(self, work: Work, choices: Sequence[Choice]) -> Usage:
        usage = Usage(work.usage_prompt, sum(choice.num_tokens for choice in choices))
        self._metrics.tokens(usage.prompt, usage.completion)
        return usage
