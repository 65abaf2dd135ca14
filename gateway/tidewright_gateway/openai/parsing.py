"""Parses request bodies in time and memory bounded by their length, however invalid they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar, get_args

import msgspec
from pydantic import ValidationError

from tidewright_gateway.openai.errors import ApiError, invalid
from tidewright_gateway.openai.protocol import AssistantMessage, Body, InputMessage

B = TypeVar("B", bound=Body)

MAX_ITEMS = 100_000  # objects, lists and fields of a body: Python takes up to a hundred times their size for them
_ROLES = tuple(
    role for kind in (InputMessage, AssistantMessage) for role in get_args(kind.model_fields["role"].annotation)
)
_TYPES = ("str", "int", "float", "bool")
MAX_FIELDS = 256  # of one object


def parse(kind: type[B], body: bytes, longest: int, max_prompts: int = 4096) -> B:
    """
    Args:
        longest: items that a list may have: what has more tokens than the model's context is refused anyway.
        max_prompts: prompts that one request may have.

    Raises:
        ApiError: it is none of this kind; says where, and what is wrong there.
    """
    if body.count(b"[") + body.count(b"{") + body.count(b'":') > MAX_ITEMS:
        raise invalid(f"the body has more than {MAX_ITEMS} objects, lists and fields", code="too_many_items")
    if not body.strip():
        raise invalid("the body is empty; send an object, such as {...}", code="invalid_json")
    try:
        data = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise invalid("the body has too many objects or lists within each other", code="invalid_json") from None
    except msgspec.MsgspecError as error:
        # msgspec also says so of a string that ends with the first half of a surrogate pair.
        why = "it ends too early, or has half of a surrogate pair" if "truncated" in str(error) else str(error)
        raise invalid(f"the body is not JSON: {why}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise invalid("the body must be an object, such as {...}")
    _check_lengths(data, longest, max_prompts)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _of_validation(error.errors(include_url=False)) from None


def _check_lengths(data: dict[str, Any], longest: int, max_prompts: int) -> None:
    """Bounds lists and objects that pydantic validates item by item, with an error for each invalid one."""
    for name, value in data.items():
        if not isinstance(value, list):
            continue
        sizes = [len(value)]
        if name == "prompt":
            if len(value) > max_prompts and isinstance(value[0], list | str):
                raise invalid(f"{len(value)} prompts are more than {max_prompts} (max_choices)", name)
            sizes += [len(item) for item in value[:longest] if isinstance(item, list)]
        elif name == "messages":
            parts = [item["content"] for item in value[:longest] if isinstance(item, dict) and "content" in item]
            sizes.append(sum(len(part) for part in parts if isinstance(part, list)))
        if max(sizes) > longest:
            message = f"{name} has {max(sizes)} items; the model's context takes {longest} tokens"
            raise invalid(message, name, "context_length_exceeded")
    if (most := max(map(len, _objects(data)))) > MAX_FIELDS:
        raise invalid(f"an object has {most} fields, more than any may have", code="too_many_items")


def _objects(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All objects that are validated field by field."""
    inner = [data, *data.get("messages", ())] if isinstance(data.get("messages"), list) else [data]
    inner += [data.get("stream_options"), data.get("response_format")]
    for found in inner:
        if isinstance(found, dict):
            yield found
            for value in (found.get("content"), [found.get("json_schema")]):
                if isinstance(value, list):
                    yield from (item for item in value if isinstance(item, dict))


def _of_validation(errors: list[Any]) -> ApiError:
    """Reports the deepest error: in a union, the alternative that the input resembles most."""
    found = max(errors, key=lambda error: len(error["loc"]))
    kind, place = found["type"], _place(found["loc"])
    if kind.startswith("union_tag"):
        place.append("role")
    param = ".".join(place) or None
    if kind == "extra_forbidden":
        return invalid(f"unknown or unsupported parameter: {param}", param, "unknown_parameter")
    if kind == "none_required" or (kind == "too_long" and found["ctx"]["max_length"] == 0):
        return invalid(f"{param} is not supported; leave it out", param, "unsupported_parameter")
    if kind in ("missing", "union_tag_not_found"):
        return invalid(f"{param} is missing", param)
    if kind == "union_tag_invalid":
        return invalid(f"{param} must be one of {', '.join(map(repr, _ROLES))}", param)
    if kind == "literal_error" and "content" in place:
        return invalid(f"{param}: only parts of text are supported, with the type 'text'", param)
    if kind in ("model_type", "model_attributes_type"):
        return invalid(f"{param}: must be an object, such as {{...}}", param)
    return invalid(f"{param}: {found['msg']}", param)


def _place(loc: Sequence[str | int]) -> list[str]:
    """Without pydantic's names of the types that a field may have, and of messages, which it names by their roles."""
    place = [str(part) for part in loc[:1]]
    for before, part in pairwise(loc):
        if isinstance(part, str) and ("[" in part or part in _TYPES or (isinstance(before, int) and part in _ROLES)):
            continue
        place.append(str(part))
    return place
