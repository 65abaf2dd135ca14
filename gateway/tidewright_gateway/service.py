"""From a request of the API to the replies of its generations."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from tidewright.resilience.deadline import Deadline
from tidewright.schema import SamplingParams
from tidewright_gateway.callers import Caller
from tidewright_gateway.cluster import Cluster, Task
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.errors import ApiError, invalid
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.prompts import Prompts
from tidewright_gateway.protocol import ChatRequest, CompletionRequest
from tidewright_gateway.triton import Reply

_DEFAULT_COMPLETION = 16  # tokens, as OpenAI's


@dataclass
class Work:
    """One request of the API: a generation for each prompt and choice."""

    request_id: str
    caller: Caller
    tasks: list[Task]
    num_prompt_tokens: int
    arrived_at: float  # time.monotonic()
    echoes: list[str]
    """Of each task, the text that its answer begins with; empty if that was not asked for."""


class Service:
    def __init__(self, settings: GatewaySettings, cluster: Cluster, prompts: Prompts, metrics: Metrics) -> None:
        self._settings, self._cluster, self._prompts, self._metrics = settings, cluster, prompts, metrics

    def check_model(self, name: str | None) -> None:
        """Raises ApiError: another model than ours is asked for."""
        served = self._settings.model_name
        if name is not None and name != served:
            message = f"there is no model {name!r} here; this gateway serves {served!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    async def open(
        self, body: ChatRequest | CompletionRequest, caller: Caller, request_id: str, arrived_at: float
    ) -> Work:
        """Whoever opens it must `close` it.

        Raises:
            ApiError: it can't be done as asked.
        """
        self.check_model(body.model)
        n = 1 if body.n is None else body.n
        shown: list[str | list[int]] = []
        if isinstance(body, ChatRequest):
            self._check_size(1, n)
            prompts = [await self._prompts.of_chat(body.messages)]
            sampling = body.sampling(max(self._cluster.max_model_len - len(prompts[0]), 1))
        else:
            texts = body.prompts
            if not texts:
                raise invalid("prompt is an empty list; send at least one prompt", "prompt")
            self._check_size(len(texts), n)
            sampling = body.sampling(_DEFAULT_COMPLETION)
            prompts = [await self._prompts.of_text(text) for text in texts]
            shown = texts if body.echo else []
        tasks = self._tasks(request_id, prompts, sampling, n, arrived_at)
        decode = self._prompts.tokenizer.decode
        echoes = [text if isinstance(text, str) else decode(text) for text in shown for _ in range(n)]
        return Work(request_id, caller, tasks, sum(map(len, prompts)), arrived_at, echoes)

    def _check_size(self, num_prompts: int, n: int) -> None:
        if n < 1:
            raise invalid("n must be at least 1", "n")
        most = self._settings.max_choices
        if num_prompts * n > most:
            raise invalid(f"{num_prompts} prompts times n = {n} is more than {most} (max_choices)", "n")

    def _tasks(
        self, request_id: str, prompts: Sequence[list[int]], sampling: SamplingParams, n: int, arrived_at: float
    ) -> list[Task]:
        """`n` of each prompt; the same seed, one more for each of them."""
        max_model_len = self._cluster.max_model_len
        for prompt in prompts:
            if len(prompt) >= max_model_len:
                message = (
                    f"the prompt has {len(prompt)} tokens; with its answer the model's context takes {max_model_len}"
                )
                raise invalid(message, code="context_length_exceeded")
        seed = sampling.seed
        if seed is None and sampling.temperature > 0:
            seed = secrets.randbits(62)  # so that another replica can go on as this one would have
        longest = self._settings.request_timeout
        deadline = Deadline.after(longest if sampling.timeout is None else min(sampling.timeout, longest), arrived_at)
        tasks: list[Task] = []
        for prompt in prompts:
            for number in range(n):
                own = sampling if seed is None else msgspec.structs.replace(sampling, seed=(seed + number) % 2**63)
                tasks.append(Task(f"{request_id}-{len(tasks)}", prompt, own, deadline, sampling.logprobs is not None))
        return tasks

    async def close(self, work: Work, num_tokens: int) -> None:
        """It has ended, however it did. `num_tokens`: what it generated."""
        self._metrics.tokens(work.num_prompt_tokens, num_tokens)

    async def replies(self, work: Work) -> AsyncGenerator[tuple[int, Reply], None]:
        """Replies of all generations as they come, each with its index; leaving early ends them.

        Raises:
            ModelError: one of them failed; the others are given up.
        """
        if len(work.tasks) == 1:
            async with aclosing(self._replies_of(work.tasks[0], work)) as replies:
                async for reply in replies:
                    yield 0, reply
            return
        arrived: asyncio.Queue[tuple[int, Reply] | Exception | None] = asyncio.Queue(maxsize=len(work.tasks))

        async def forward(index: int) -> None:
            try:
                async with aclosing(self._replies_of(work.tasks[index], work)) as replies:
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

    async def _replies_of(self, task: Task, work: Work) -> AsyncGenerator[Reply, None]:
        is_first = True
        self._metrics.asked(time.monotonic() - work.arrived_at)
        async with aclosing(self._cluster.generate(task)) as replies:
            async for reply in replies:
                if is_first and reply.token_ids:
                    is_first = False
                    self._metrics.first_token(time.monotonic() - work.arrived_at)
                yield reply
