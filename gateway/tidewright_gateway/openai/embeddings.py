"""/v1/embeddings (OpenAI's) and /v1/score (vLLM's): their bodies and answers. The pipeline computes the embeddings."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from pydantic import Field, StrictInt, StrictStr
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidewright.resilience.errors import ModelError
from tidewright_gateway.context import RequestContext
from tidewright_gateway.http.middleware import ClientGoneError, unless_client_leaves
from tidewright_gateway.models import Model
from tidewright_gateway.openai.errors import JSON, ApiError, invalid, of_model
from tidewright_gateway.openai.fields import Many
from tidewright_gateway.openai.prompts import places_of
from tidewright_gateway.openai.protocol import Body
from tidewright_gateway.pipeline import Pipeline


class EmbeddingRequest(Body):
    model: StrictStr
    """Model name, as in /v1/models."""
    input: StrictStr | Many[StrictStr] | Many[StrictInt] | Many[Many[StrictInt]]
    """Text or token ids, or a list of either with at most 2048 items."""
    encoding_format: Literal["float", "base64"] | None = None
    """How the answer has each embedding: as a list of numbers (the default), or as base64 of little-endian float32."""
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    """Keep this many numbers from the start of each embedding, scaled to length 1. For models trained for that."""
    user: StrictStr | None = None
    """The end user: has limits of its own within the key's."""
    priority: StrictInt | None = None
    """Lower runs first; added to the key's own. Negative values count as 0 unless the key is an admin's."""

    @property
    def inputs(self) -> list[str | list[int]]:
        given: Any = self.input
        return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)


class ScoreRequest(Body):
    model: StrictStr
    """Model name, as in /v1/models."""
    text_1: StrictStr | Many[StrictStr]
    """A text, or a list of as many as text_2 has."""
    text_2: StrictStr | Many[StrictStr]
    """A text or a list of texts: each is compared with text_1, or with the one at its place there."""
    user: StrictStr | None = None
    """The end user: has limits of its own within the key's."""
    priority: StrictInt | None = None
    """Lower runs first; added to the key's own. Negative values count as 0 unless the key is an admin's."""


Vector = npt.NDArray[np.float32]


class Embeddings:
    """Makes the answers."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def embed(self, context: RequestContext, body: bytes) -> bytes:
        async with self._pipeline.enter(context, EmbeddingRequest, body) as request:
            context.served.check_task(embeds=True)
            size = max(context.served.failover.embedding_sizes, default=0)
            if request.dimensions and size:
                _check_dimensions(request.dimensions, size)
            prompts = await _tokenize(context.served, request.inputs, places_of(request.input, "input"), "input")
            vectors = await self._pipeline.embed(context, prompts, request.user, request.priority or 0)
            if request.dimensions:
                vectors = [_shortened(vector, request.dimensions) for vector in vectors]
        encode = _base64 if request.encoding_format == "base64" else _numbers
        data = [
            {"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)
        ]
        return msgspec.json.encode({"object": "list", "data": data, "model": context.model, "usage": _usage(context)})

    async def score(self, context: RequestContext, body: bytes) -> bytes:
        async with self._pipeline.enter(context, ScoreRequest, body) as request:
            context.served.check_task(embeds=True)
            first, second = _as_list(request.text_1), _as_list(request.text_2)
            if len(first) not in (1, len(second)):
                raise invalid(
                    f"text_1 has {len(first)} texts and text_2 has {len(second)}; send one or as many", "text_1"
                )
            prompts = await _tokenize(context.served, first, places_of(request.text_1, "text_1"), "text_1")
            prompts += await _tokenize(context.served, second, places_of(request.text_2, "text_2"), "text_2")
            vectors = await self._pipeline.embed(context, prompts, request.user, request.priority or 0)
        lefts, rights = vectors[: len(first)], vectors[len(first) :]
        pairs = zip(lefts * (len(second) // len(first)), rights, strict=True)
        data = [
            {"index": index, "object": "score", "score": _cosine(left, right)}
            for index, (left, right) in enumerate(pairs)
        ]
        head = {"id": f"score-{context.request_id}", "object": "list", "created": int(time.time())}
        return msgspec.json.encode({**head, "model": context.model, "data": data, "usage": _usage(context)})


class Computed(Response):
    """An ASGI response whose body is computed while it is sent, unless the client disconnects."""

    def __init__(self, make: Callable[[RequestContext, bytes], Coroutine[Any, Any, bytes]], body: bytes) -> None:
        self._make, self._body = make, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError: nothing has been sent."""
        context: RequestContext = scope["state"]["context"]
        try:
            body = await unless_client_leaves(receive, self._make(context, self._body))
        except ClientGoneError:
            raise ApiError(499, "client disconnected", code="cancelled") from None
        except ModelError as error:
            raise of_model(error) from None
        await Response(body, headers=dict(context.headers), media_type=JSON)(scope, receive, send)


async def _tokenize(
    model: Model, texts: Sequence[str | list[int]], places: Sequence[str], param: str
) -> list[list[int]]:
    if not texts:
        raise invalid(f"{param} is an empty list; send at least one text", param)
    limit, found = model.failover.max_model_len, []
    for text, place in zip(texts, places, strict=True):
        token_ids = await model.prompts.of_text(text, limit, place)
        if len(token_ids) > limit:
            # Clients look for the first words.
            message = f"This model's maximum context length is {limit} tokens; {place} has {len(token_ids)}"
            raise invalid(message, place, "context_length_exceeded")
        found.append(token_ids)
        await asyncio.sleep(0)  # many texts must not hold up other requests
    return found


def _as_list(text: str | list[str]) -> list[str]:
    return [text] if isinstance(text, str) else text


def _check_dimensions(asked: int, size: int) -> None:
    if asked > size:
        raise invalid(f"dimensions is {asked}, more than the {size} of the model", "dimensions")


def _vector(raw: bytes) -> Vector:
    return np.frombuffer(raw, "<f4")


def _shortened(raw: bytes, dimensions: int) -> bytes:
    """The first numbers, scaled to length 1."""
    vector = _vector(raw)
    _check_dimensions(dimensions, len(vector))
    vector = vector[:dimensions]
    length = float(np.linalg.norm(vector))
    return (vector / length if length else vector).astype("<f4").tobytes()


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _numbers(raw: bytes) -> list[float]:
    numbers: list[float] = _vector(raw).tolist()
    return numbers


def _cosine(left: bytes, right: bytes) -> float:
    a, b = _vector(left).astype(np.float64), _vector(right).astype(np.float64)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 0.0


def _usage(context: RequestContext) -> dict[str, int]:
    return {"prompt_tokens": context.num_prompt_tokens, "total_tokens": context.num_prompt_tokens}
