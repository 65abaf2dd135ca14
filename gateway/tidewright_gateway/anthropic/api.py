"""The endpoints of Anthropic's API for one request each."""

from __future__ import annotations

from tidewright_gateway.anthropic.answer import MessagesAnswer
from tidewright_gateway.anthropic.protocol import MessagesRequest
from tidewright_gateway.anthropic.translation import TranslatedRequest, as_sent, chat_of
from tidewright_gateway.context import RequestContext
from tidewright_gateway.openai.answers import Answer
from tidewright_gateway.openai.api import Api
from tidewright_gateway.openai.errors import ApiError


class MessagesApi(Api[MessagesRequest, TranslatedRequest]):
    kind = MessagesRequest

    async def translate(self, context: RequestContext, body: MessagesRequest) -> TranslatedRequest:
        return chat_of(body)

    def as_sent(self, error: ApiError) -> ApiError:
        return as_sent(error)

    def answer(self, context: RequestContext, request: TranslatedRequest) -> Answer:
        return MessagesAnswer(context, request, context.served.prompts.dialect)
