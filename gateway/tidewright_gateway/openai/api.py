"""The endpoints that generate: each makes requests of its bodies, and answers of replies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.answers import Answer
from tidewright_gateway.openai.chat import ChatRequest
from tidewright_gateway.openai.chat_answer import ChatAnswer
from tidewright_gateway.openai.completion_answer import CompletionAnswer
from tidewright_gateway.openai.errors import ApiError
from tidewright_gateway.openai.protocol import Body, CompletionRequest, GenerationBody

B = TypeVar("B", bound=Body)
G = TypeVar("G", bound=GenerationBody)


class Api(ABC, Generic[B, G]):
    """For one request."""

    kind: type[B]

    @abstractmethod
    async def translate(self, context: RequestContext, body: B) -> G:
        """The request of a body. Raises ApiError: there is none."""

    def as_sent(self, error: ApiError) -> ApiError:
        """An error about the request, with the names of fields as its body has them."""
        return error

    @abstractmethod
    def answer(self, context: RequestContext, request: G) -> Answer:
        """An empty answer."""


class ChatApi(Api[ChatRequest, ChatRequest]):
    kind = ChatRequest

    async def translate(self, context: RequestContext, body: ChatRequest) -> ChatRequest:
        return body

    def answer(self, context: RequestContext, request: ChatRequest) -> Answer:
        prompts = context.served.prompts
        return ChatAnswer(context, request, prompts.dialect, prompts.tokenizer)


class CompletionApi(Api[CompletionRequest, CompletionRequest]):
    kind = CompletionRequest

    async def translate(self, context: RequestContext, body: CompletionRequest) -> CompletionRequest:
        return body

    def answer(self, context: RequestContext, request: CompletionRequest) -> Answer:
        return CompletionAnswer(context, request, context.served.prompts.tokenizer)
