"""An API request, phase by phase: cheap phases first, shared resources last.

    cheap checks → who → reserve a request → validate → tokenize → reserve tokens → queue → place → generate → settle

The cheap checks (sizes, encodings, hosts) are in `http/middleware.py`, what follows the reservation of tokens is in
`execution.py`, and the rest, settling included, is here.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import msgspec

from tidewright.resilience.deadline import Deadline
from tidewright.schema import SamplingParams
from tidewright_gateway.admission.limits import Estimates, Limiter, subjects_of
from tidewright_gateway.admission.limits.store import Subject
from tidewright_gateway.admission.smaller_variant import can_replace
from tidewright_gateway.auth import Authenticator
from tidewright_gateway.auth.callers import priority_of, salt_of, tenant_of
from tidewright_gateway.cache.responses import ResponseCache, is_repeatable
from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.context import RequestContext
from tidewright_gateway.execution import Execution
from tidewright_gateway.metrics import Metrics
from tidewright_gateway.models import Models
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.openai.parsing import parse
from tidewright_gateway.openai.protocol import Body, GenerationBody
from tidewright_gateway.replicas.failover import Generation

log = logging.getLogger(__name__)

B = TypeVar("B", bound=Body)
G = TypeVar("G", bound=GenerationBody)

REVOKED_INTERVAL = 0.5  # seconds between two checks of the keys of running requests
END_INTERVAL = 0.1  # seconds between two looks for requests to end, once the gateway's time is over


class Pipeline:
    def __init__(
        self,
        settings: GatewaySettings,
        authenticator: Authenticator,
        limiter: Limiter,
        models: Models,
        cache: ResponseCache,
        metrics: Metrics,
    ) -> None:
        self._settings, self._authenticator, self._limiter = settings, authenticator, limiter
        self._models, self.metrics = models, metrics
        self._estimates = Estimates()
        self._running: dict[RequestContext, asyncio.Task[object]] = {}
        self._shuts_down = False
        self.execution = Execution(settings.queue_timeout, limiter, cache, metrics, self._running)

    @asynccontextmanager
    async def admit(
        self,
        context: RequestContext,
        kind: type[B],
        body: bytes,
        translate: Callable[[RequestContext, B], Awaitable[G]],
    ) -> AsyncGenerator[G, None]:
        """A request that generates, from its arrival to its end; pass its context to `execution`.

        Args:
            translate: makes the request of a body in another API's format.

        Raises:
            ApiError: it can't be done as asked.
        """
        async with self.enter(context, kind, body) as given:  # who, reserve a request, validate … settle
            context.served.check_task(embeds=False)
            record = context.record
            record.begin("tokenize")
            request, sampling, prompts = await self._prepare(context, given, translate)
            record.end()
            await self._reserve_tokens(context, request, sampling, prompts)
            record.event("tokens_reserved")
            self._make_generations(context, prompts, sampling, request.n or 1)
            yield request
            if request.asked_tokens is None:
                self._estimates.learn(context.caller, context.num_tokens / len(context.generations))

    @asynccontextmanager
    async def enter(self, context: RequestContext, kind: type[B], body: bytes) -> AsyncGenerator[B, None]:
        """A request of any kind, from its arrival to its end.

        Raises:
            ApiError: it may not be made, or is not valid.
        """
        record = context.record
        record.begin("admit", context.arrived_at)
        context.caller = caller = await self._authenticator.caller(context.credential)
        record.event("authenticated")
        subjects = subjects_of(caller, None, self._settings)
        context.reservation = await self._limiter.reserve(subjects)
        record.event("reserved")
        self._running[context] = asyncio.current_task()  # type: ignore[assignment] # there is one
        try:
            policy = context.ignored_fields
            policy.ignores_unknown = self._settings.unknown_fields == "ignore"
            request = parse(kind, body, self._models.max_model_len, self._settings.max_choices, policy)
            context.model = request.model
            context.served, context.adapter = await self._models.find(request.model)
            if context.adapter:
                self.metrics.adapter_asked(context.adapter.name)
            record.end()
            yield request
        except asyncio.CancelledError:
            if context.ended_by:
                raise context.ended_by from None
            raise
        finally:
            del self._running[context]
            await self._limiter.settle(context.reservation, context.num_prompt_tokens + context.num_tokens)
            record.event("settled")
            if context.generations:
                used = context.num_prompt_tokens, context.num_cached_tokens, context.num_tokens
                self.metrics.tokens(caller.key_id, *used)
                if (seconds := context.time_per_output_token) is not None:
                    self.metrics.time_per_output_token(seconds)

    def shut_down(self) -> None:
        """The process ends: requests that still run after `shutdown_grace` seconds end with that reason."""
        if not self._shuts_down:
            self._shuts_down = True
            asyncio.get_running_loop().call_later(self._settings.shutdown_grace, self._end_all)

    def _end_all(self) -> None:
        error = ApiError(
            503, "the gateway is shutting down, and shutdown_grace is over", code="going_away", retry_after=1
        )
        for context, task in self._running.items():
            if context.ended_by is None:
                context.ended_by = error
                task.cancel()
        asyncio.get_running_loop().call_later(END_INTERVAL, self._end_all)  # those that came meanwhile

    async def end_revoked(self) -> None:
        """Runs for ever: ends running requests whose key was revoked or has expired."""
        while self._authenticator.asks_for_keys:
            await asyncio.sleep(REVOKED_INTERVAL)
            refused: dict[str | None, ApiError] = {}
            for credential in {context.credential for context in self._running}:
                try:
                    await self._authenticator.caller(credential)
                except ApiError as error:
                    refused[credential] = error
                except Exception:
                    log.exception("the key of a running request could not be checked")
            for context, task in list(self._running.items()):
                if refusal := refused.get(context.credential):
                    context.ended_by = refusal
                    task.cancel()

    # Tokenize and reserve tokens.

    async def _prepare(
        self, context: RequestContext, given: B, translate: Callable[[RequestContext, B], Awaitable[G]]
    ) -> tuple[G, SamplingParams, list[list[int]]]:
        """For the model, or its smaller variant if the load says so and that can do what is asked."""
        whole = context.served
        if smaller := None if context.adapter else self._models.smaller(whole):
            context.served, context.is_smaller = smaller, True
            with suppress(ApiError):  # the model says whether it is one, and how large its context is
                request, sampling, prompts = await self._prepare_for(context, given, translate)
                if can_replace(smaller, whole, request, max(map(len, prompts)) + sampling.max_tokens):
                    return request, sampling, prompts
            context.served, context.is_smaller = whole, False
        return await self._prepare_for(context, given, translate)

    async def _prepare_for(
        self, context: RequestContext, given: B, translate: Callable[[RequestContext, B], Awaitable[G]]
    ) -> tuple[G, SamplingParams, list[list[int]]]:
        request = await translate(context, given)
        sampling = self._sampling(context, request)
        prompts = await self._tokenize(context, request)
        return request, self._adapt(context, request, sampling, prompts), prompts

    def _sampling(self, context: RequestContext, request: GenerationBody) -> SamplingParams:
        dialect, use = context.served.prompts.dialect, request.tool_use
        sampling = request.sampling(dialect.defaults)
        context.is_guided = sampling.guided or (use is not None and use.is_forced)
        guided = dialect.guide(sampling, use)
        made = guided.guided_grammar
        context.wording = request.wording(use, made if made != sampling.guided_grammar else None)
        return guided

    async def _tokenize(self, context: RequestContext, request: GenerationBody) -> list[list[int]]:
        most, n = self._settings.max_choices, 1 if request.n is None else request.n
        if n < 1:
            raise invalid("n must be at least 1", "n")
        if request.num_prompts * n > most:
            raise invalid(f"{request.num_prompts} prompts times n = {n} is more than {most} (max_choices)", "n")
        limit = context.served.failover.max_model_len
        tokenized = await context.served.prompts.of_request(request, limit)
        if (asked := request.asked_tokens or 0) > limit:
            name = "max_tokens" if request.max_tokens == asked else "max_completion_tokens"
            raise invalid(f"{name} is {asked}, more than the model's context of {limit} tokens", name)
        context.prompt_end, context.choices_per_prompt = tokenized.end, n
        context.echoes = [echo for echo in tokenized.echoes for _ in range(n)]
        return tokenized.prompts

    def _adapt(
        self, context: RequestContext, request: GenerationBody, sampling: SamplingParams, prompts: list[list[int]]
    ) -> SamplingParams:
        """Adapts its parameters to role, prompt length and load."""
        caller = context.caller
        context.is_repeatable = is_repeatable(sampling)
        max_tokens = sampling.max_tokens
        if isinstance(request, ChatRequest) and request.asked_tokens is None:
            max_tokens = max(context.served.failover.max_model_len - len(prompts[0]), 1)
        priority = priority_of(caller, sampling.priority)
        is_next = context.served.queue.is_next(caller.key_id, priority, caller.weight)
        given = context.served.ladder.treatment(max_tokens, is_guided=sampling.guided, is_next=is_next)
        context.route, context.is_shortened = given.route, given.max_tokens < max_tokens
        return msgspec.structs.replace(
            sampling,
            max_tokens=given.max_tokens,
            min_tokens=min(sampling.min_tokens, given.max_tokens) if context.is_shortened else sampling.min_tokens,
            priority=priority,
            cache_salt=salt_of(caller, request.user, sampling.cache_salt),
            lora_name=context.adapter_name,
            tenant=tenant_of(caller),
            tenant_weight=caller.weight,
        )

    async def _reserve_tokens(
        self, context: RequestContext, request: GenerationBody, sampling: SamplingParams, prompts: list[list[int]]
    ) -> None:
        """Reserves all that it may use; without max_tokens an estimate, which grows while it runs."""
        context.num_prompt_tokens = sum(map(len, prompts))
        answers = len(prompts) * (request.n or 1)
        cost = most = answers * sampling.max_tokens
        subjects = subjects_of(context.caller, request.user, self._settings)
        limits = [limit for subject in subjects for limit in subject.limits.of_tokens]
        if request.asked_tokens is None and limits:
            # At most the limit itself, or the request would never fit.
            probable = answers * self._estimates.of(context.caller)
            cost = max(min(probable, most, min(limits) - context.num_prompt_tokens), 1)
            context.growth = max(cost // 2, 1) if cost < most else 0
        await self._extend(context, subjects, cost)

    async def _extend(self, context: RequestContext, subjects: Sequence[Subject], cost: int) -> None:
        """Reserves the tokens of its prompts, and `cost` for its answers."""
        try:
            await self._limiter.extend(context.reservation, subjects, context.num_prompt_tokens + cost)
        except ApiError:
            context.num_prompt_tokens = 0  # nothing was computed
            raise

    def _make_generations(
        self, context: RequestContext, prompts: Sequence[list[int]], sampling: SamplingParams, n: int
    ) -> None:
        """Makes `n` generations per prompt."""
        longest = self._settings.request_timeout
        timeout = longest if sampling.timeout is None else min(sampling.timeout, longest)
        deadline, logprobs = Deadline.after(timeout, context.arrived_at), sampling.logprobs is not None
        for prompt in prompts:
            for seed in _seeds(sampling, n):
                own = msgspec.structs.replace(sampling, seed=seed)
                index = len(context.generations)
                made = Generation(f"{context.request_id}-{index}", prompt, own, deadline, logprobs)
                made.trace, made.record, made.index = context.trace, context.record, index
                context.generations.append(made)

    async def embed(
        self, context: RequestContext, prompts: Sequence[list[int]], user: str | None, priority: int
    ) -> list[bytes]:
        """Embeddings of the prompts, in their order, as little-endian float32. Cancelling it ends them.

        Raises:
            ApiError: the limits or the load don't allow it.
            ModelError: one of them failed; the others are cancelled.
        """
        caller, settings, priority = context.caller, self._settings, priority_of(context.caller, priority)
        is_next = context.served.queue.is_next(caller.key_id, priority, caller.weight)
        context.served.ladder.treatment(1, is_guided=True, is_next=is_next)  # it is refused or whole
        context.num_prompt_tokens = sum(map(len, prompts))
        await self._extend(context, subjects_of(caller, user, settings), 0)
        sampling = SamplingParams(
            priority=priority,
            cache_salt=salt_of(caller, user, None),
            lora_name=context.adapter_name,
            tenant=tenant_of(caller),
            tenant_weight=caller.weight,
        )
        deadline, shared = Deadline.after(settings.request_timeout, context.arrived_at), (context.trace, context.record)
        context.generations = [
            Generation(f"{context.request_id}-{index}", prompt, sampling, deadline, False, *shared, index, embeds=True)
            for index, prompt in enumerate(prompts)
        ]
        return await self.execution.embeddings(context)


def _seeds(sampling: SamplingParams, n: int) -> list[int | None]:
    """Seeds of the choices of one prompt: consecutive numbers."""
    seed = sampling.seed
    if seed is None and sampling.temperature == 0:
        return [None] * n
    if seed is None:
        seed = secrets.randbits(62)  # fixed here, so that another replica can continue with it
    return [(seed + number) % 2**63 for number in range(n)]
