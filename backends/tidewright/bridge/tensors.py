"""Reads input tensors: an element, a text, a list of token ids."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tidewright.errors import InvalidRequestError


def decode_text(value: object, name: str) -> str:
    """The text in one element of a BYTES tensor."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from None


def single(tensors: Mapping[str, np.ndarray], name: str) -> object | None:
    """The only element of an optional tensor, None if it was not sent."""
    tensor = tensors.get(name)
    if tensor is None:
        return None
    if tensor.size != 1:
        raise InvalidRequestError(f"{name} must hold exactly one element, got shape {list(tensor.shape)}")
    return tensor.reshape(-1)[0]


def token_ids(tensors: Mapping[str, np.ndarray], name: str, max_model_len: int) -> list[int]:
    """Empty without such a tensor. One too long for the model is refused before it becomes a list."""
    ids = tensors.get(name)
    if ids is None:
        return []
    if ids.size > max_model_len:
        raise InvalidRequestError(f"{name} has {ids.size} tokens, more than the model's context of {max_model_len}")
    return list(ids.reshape(-1).tolist())
