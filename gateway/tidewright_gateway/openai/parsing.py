"""Parses request bodies in time and memory bounded by their length, however invalid they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar, get_args

import msgspec
from pydantic import ValidationError

from tidewright_gateway.anthropic.blocks import BLOCK_TYPES
from tidewright_gateway.openai.errors import MAX_SHOWN, ApiError, invalid
from tidewright_gateway.openai.fields import ApiObject, FieldPolicy
from tidewright_gateway.openai.messages import AssistantMessage, InputMessage, ToolMessage
from tidewright_gateway.openai.responses.items import ITEM_TYPES

B = TypeVar("B", bound=ApiObject)

MAX_ITEMS = 100_000  # objects, lists and fields of a body: Python takes up to a hundred times their size for them
_MESSAGES = (InputMessage, AssistantMessage, ToolMessage)
_ROLES = tuple(role for kind in _MESSAGES for role in get_args(kind.model_fields["role"].annotation))
_TAGS = (*_ROLES, *ITEM_TYPES)
_TYPES = ("str", "int", "float", "bool")
_LISTS_OF_PARTS = ("messages", "input")
MAX_INPUTS = 2048  # texts to embed in one request, as OpenAI has it
_INPUTS = ("input", "text_1", "text_2")


def parse(kind: type[B], body: bytes, longest: int, max_prompts: int = 4096, policy: FieldPolicy | None = None) -> B:
    """
    Args:
        policy: of fields without effect; gets their names.
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
        return kind.model_validate(data, context=policy)
    except ValidationError as error:
        raise _of_validation(error.errors(include_url=False)) from None


def _check_lengths(data: dict[str, Any], longest: int, max_prompts: int) -> None:
    """Bounds lists and objects that pydantic validates item by item, with an error for each invalid one."""
    for name, value in data.items():
        if not isinstance(value, list):
            continue
        sizes = [len(value)]
        if name in _INPUTS and value and isinstance(value[0], list | str):
            if len(value) > MAX_INPUTS:
                raise invalid(f"{name} has {len(value)} texts, more than {MAX_INPUTS}", name, "too_many_items")
            sizes = [len(item) for item in value if isinstance(item, list)]
        elif name == "prompt":
            if len(value) > max_prompts and isinstance(value[0], list | str):
                raise invalid(f"{len(value)} prompts are more than {max_prompts} (max_choices)", name)
            sizes += [len(item) for item in value[:longest] if isinstance(item, list)]
        elif name in _LISTS_OF_PARTS:
            parts = [item["content"] for item in value[:longest] if isinstance(item, dict) and "content" in item]
            sizes.append(sum(len(part) for part in parts if isinstance(part, list)))
        if max(sizes, default=0) > longest:
            message = f"This model's maximum context length is {longest} tokens; {name} has {max(sizes)} items"
            raise invalid(message, name, "context_length_exceeded")


def _of_validation(errors: list[Any]) -> ApiError:
    """Reports the deepest error: in a union, the alternative that the input resembles most."""
    found = max(errors, key=lambda error: len(error["loc"]))
    kind, place = found["type"], _place(found["loc"])
    if kind in ("refused_field", "too_many_fields"):
        code = "unsupported_parameter" if kind == "refused_field" else "too_many_items"
        return invalid(found["msg"], found["ctx"].get("field"), code)
    if place and place[0] == "tool_choice" and any("[" in str(part) for part in found["loc"]):  # OpenAI's
        message = 'tool_choice must be "none", "auto", "required", or an object of type "function" that names a tool'
        return invalid(message, "tool_choice")
    if kind == "union_tag_invalid" and "content" in place and found["ctx"]["tag"] not in BLOCK_TYPES:
        given = str(found["ctx"]["tag"])[:MAX_SHOWN]
        return invalid(f"this model takes text only; {'.'.join(place)} is {given}", ".".join(place))
    if kind.startswith("union_tag"):
        place.append(found["ctx"]["discriminator"].strip("'"))
    param = ".".join(place) or None
    if kind == "extra_forbidden":
        return invalid(f"unknown or unsupported parameter: {param}", param, "unknown_parameter")
    if kind in ("missing", "union_tag_not_found"):
        return invalid(f"{param} is missing", param)
    if kind == "union_tag_invalid":
        return invalid(f"{param} must be one of {found['ctx']['expected_tags']}", param)
    if kind == "literal_error" and place[0] == "tools":
        given, expected = str(found["input"])[:MAX_SHOWN], found["ctx"]["expected"]
        message = f"{param}: only functions can be called here; it must be {expected}, not {given!r}"
        return invalid(message, param)
    if kind == "literal_error" and "content" in place:
        given = str(found["input"])[:MAX_SHOWN]
        return invalid(f"this model takes text only; {'.'.join(place[:-1])} is {given}", param)
    if kind in ("model_type", "model_attributes_type"):
        return invalid(f"{param}: must be an object, such as {{...}}", param)
    return invalid(f"{param}: {found['msg']}", param)


def _place(loc: Sequence[str | int]) -> list[str]:
    """Without pydantic's names of the types that a field may have, and of messages, items and blocks, by their tags."""
    place = [str(part) for part in loc[:1]]
    for number, (before, part) in enumerate(pairwise(loc), 2):
        in_list = isinstance(before, int)
        is_type = number < len(loc) and (before == "tool_choice" or (in_list and part in BLOCK_TYPES))
        is_tag = is_type or (in_list and part in _TAGS)
        if isinstance(part, str) and ("[" in part or part in _TYPES or is_tag):
            continue
        place.append(str(part))
    return place
