"""Answers of the gateway without a server: a context as the pipeline makes it, and a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tidewright.resilience.deadline import Deadline
from tidewright.schema import SamplingParams
from tidewright.tokenization import Tokenizer
from tidewright_gateway.config.api import ApiSettings
from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.chat_answer import ChatAnswer
from tidewright_gateway.openai.completion_answer import CompletionAnswer
from tidewright_gateway.openai.dialect import Dialect
from tidewright_gateway.openai.protocol import CompletionRequest
from tidewright_gateway.replicas.failover import Generation
from tidewright_gateway.tracing.context import Tracer

USER = {"role": "user", "content": "Hi"}


def context_of(prompt: Sequence[int] = (1,), n: int = 1) -> RequestContext:
    context = RequestContext("id", Tracer(0).begin(()), num_prompt_tokens=len(prompt))
    context.generations = [Generation("id", list(prompt), SamplingParams(), Deadline()) for _ in range(n)]
    return context


def chat_answer(
    tokenizer: Tokenizer, context: RequestContext | None = None, api: Mapping[str, Any] | None = None, **fields: Any
) -> ChatAnswer:
    """`api`: options of the gateway; `fields`: of the request."""
    request = ChatRequest.model_validate({"model": "m", "messages": [USER], **fields})
    return ChatAnswer(context or context_of(), request, Dialect(tokenizer, ApiSettings(**(api or {}))), tokenizer)


def completion_answer(tokenizer: Tokenizer, context: RequestContext | None = None, **fields: Any) -> CompletionAnswer:
    request = CompletionRequest.model_validate({"model": "m", "prompt": "a", **fields})
    return CompletionAnswer(context or context_of(), request, tokenizer)
