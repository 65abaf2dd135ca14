"""Every operation of the document: its id and tag, which generators make names of, its body, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from tidewright_gateway.anthropic.protocol import CountTokensRequest, MessagesRequest
from tidewright_gateway.document import (
    chat,
    completion,
    messages,
    models,
    response,
    response_events,
    status,
    tokens,
    vectors,
)
from tidewright_gateway.document.errors import AnthropicError, ErrorBody
from tidewright_gateway.http.adapters import LoadAdapterRequest, UnloadAdapterRequest
from tidewright_gateway.http.operations import DrainRequest, ModelRequest
from tidewright_gateway.openai.chat import ChatRequest, TokenizeRequest
from tidewright_gateway.openai.embeddings import EmbeddingRequest, ScoreRequest
from tidewright_gateway.openai.protocol import CompletionRequest, DetokenizeRequest
from tidewright_gateway.openai.responses.request import ResponsesRequest


@dataclass(frozen=True)
class Described:
    id: str
    """Clients that are generated call it by this name: it never changes."""
    tag: str
    answers: tuple[type[BaseModel], ...]
    """What an answer with status 200 may be; a text if empty."""
    body: type[BaseModel] | None = None
    events: type[BaseModel] | None = None
    """The data of each event of its stream."""
    errors: tuple[type[BaseModel], ...] = (ErrorBody,)

    @property
    def models(self) -> tuple[type[BaseModel], ...]:
        return (*self.answers, *(one for one in (self.body, self.events) if one), *self.errors)


_ANTHROPIC = (AnthropicError,)
_EITHER = (ErrorBody, AnthropicError)  # as the header anthropic-version says

OPERATIONS: dict[tuple[str, str], Described] = {
    ("post", "/v1/chat/completions"): Described(
        "createChatCompletion", "chat", (chat.ChatCompletion,), ChatRequest, chat.ChatCompletionChunk
    ),
    ("post", "/v1/completions"): Described(
        "createCompletion", "completions", (completion.Completion,), CompletionRequest, completion.CompletionChunk
    ),
    ("post", "/v1/embeddings"): Described("createEmbedding", "embeddings", (vectors.EmbeddingList,), EmbeddingRequest),
    ("post", "/v1/score"): Described("createScore", "embeddings", (vectors.ScoreList,), ScoreRequest),
    ("post", "/v1/messages"): Described(
        "createMessage",
        "messages",
        (messages.AnthropicMessage,),
        MessagesRequest,
        messages.MessageEvent,
        _ANTHROPIC,
    ),
    ("post", "/v1/messages/count_tokens"): Described(
        "countTokens", "messages", (tokens.TokenCount,), CountTokensRequest, errors=_ANTHROPIC
    ),
    ("post", "/v1/responses"): Described(
        "createResponse", "responses", (response.ResponseObject,), ResponsesRequest, response_events.ResponseEvent
    ),
    ("get", "/v1/responses/{response_id}"): Described("getResponse", "responses", (response.ResponseObject,)),
    ("delete", "/v1/responses/{response_id}"): Described("deleteResponse", "responses", (response.DeletedResponse,)),
    ("get", "/v1/responses/{response_id}/input_items"): Described(
        "listInputItems", "responses", (response.InputItemList,)
    ),
    ("post", "/v1/responses/{response_id}/cancel"): Described(
        "cancelResponse", "responses", (response.ResponseObject,)
    ),
    ("post", "/tokenize"): Described("tokenize", "tokens", (tokens.Tokenized,), TokenizeRequest),
    ("post", "/detokenize"): Described("detokenize", "tokens", (tokens.Detokenized,), DetokenizeRequest),
    ("get", "/v1/models"): Described(
        "listModels", "models", (models.ModelList, models.AnthropicModelList), errors=_EITHER
    ),
    ("get", "/v1/models/{name}"): Described(
        "getModel", "models", (models.Model, models.AnthropicModel), errors=_EITHER
    ),
    ("post", "/v1/load_lora_adapter"): Described("loadLoraAdapter", "models", (), LoadAdapterRequest),
    ("post", "/v1/unload_lora_adapter"): Described("unloadLoraAdapter", "models", (), UnloadAdapterRequest),
    ("get", "/health/live"): Described("getLiveness", "operations", (status.Liveness,)),
    ("get", "/health/ready"): Described("getReadiness", "operations", (status.Readiness,)),
    ("get", "/health"): Described("getHealth", "operations", (status.Readiness,)),
    ("get", "/version"): Described("getVersion", "operations", (status.Version,)),
    ("get", "/metrics"): Described("getMetrics", "operations", ()),
    ("get", "/admin/status"): Described("getStatus", "operations", (status.GatewayStatus,)),
    ("post", "/admin/drain"): Described("drainReplica", "operations", (status.Draining,), DrainRequest),
    ("post", "/admin/models/load"): Described("loadModel", "operations", (status.LoadedModel,), ModelRequest),
    ("post", "/admin/models/unload"): Described("unloadModel", "operations", (status.UnloadedModel,), ModelRequest),
}

TAGS = {
    "chat": "OpenAI's chat completions.",
    "completions": "OpenAI's completions.",
    "embeddings": "Embeddings and scores; for servers with `--task embed`.",
    "messages": "Anthropic's Messages API.",
    "responses": "OpenAI's Responses API.",
    "tokens": "Tokens of texts and texts of tokens.",
    "models": "The served model and its LoRA adapters.",
    "operations": "Health, metrics, status and drain.",
}
