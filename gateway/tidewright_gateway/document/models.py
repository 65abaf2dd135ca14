"""The served model and its LoRA adapters, as each API lists them."""

from __future__ import annotations

from typing import Literal

from tidewright_gateway.document.base import Shown


class Model(Shown):
    id: str
    """Its name in requests."""
    object: Literal["model"]
    created: int
    """When it was prepared, or the adapter loaded, in seconds since 1970."""
    owned_by: str
    max_model_len: int
    """Tokens of prompt and answer that it takes."""
    root: str
    """Of a LoRA adapter: the name of its folder. Else as `id`."""
    parent: str | None
    """Of a LoRA adapter: the model that it belongs to."""


class ModelList(Shown):
    object: Literal["list"]
    data: list[Model]


class AnthropicModel(Shown):
    type: Literal["model"]
    id: str
    """Its name in requests."""
    display_name: str
    created_at: str
    """When it was prepared, in RFC 3339."""
    lifecycle: Literal["active"]
    max_input_tokens: int
    max_tokens: int


class AnthropicModelList(Shown):
    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None
