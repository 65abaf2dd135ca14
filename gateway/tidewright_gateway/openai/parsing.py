"""Parses request bodies in time and memory bounded by their length, however invalid they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError

from tidewright_gateway.openai.errors import MAX_SHOWN, ApiError, invalid
from tidewright_gateway.openai.fields import FieldPolicy
from tidewright_gateway.openai.protocol import Body

B = TypeVar("B", bound=Body)

MAX_ITEMS = 100_000  # objects, lists and fields of a body: Python takes up to a hundred times their size for them
_FIELD = re.compile(rb'"\s*:')
_TEXTS = ("text", "input_text", "output_text", "refusal")  # types of parts, in one API or another
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
    if _has_too_many_items(body):
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
        raise _of_validation(error.errors(include_url=False), kind, data) from None


def _has_too_many_items(body: bytes) -> bool:
    nested = body.count(b"[") + body.count(b"{")
    if nested + body.count(b":") <= MAX_ITEMS:
        return False
    return nested + sum(1 for _ in _FIELD.finditer(body)) > MAX_ITEMS  # not every colon is of a field


def _check_lengths(data: dict[str, Any], longest: int, max_prompts: int) -> None:
    """Bounds lists and objects that pydantic validates item by item, with an error for each invalid one."""
    for name, value in data.items():
        if not isinstance(value, list):
            continue
        sizes = {name: len(value)}
        if name in _INPUTS and value and isinstance(value[0], list | str):
            if len(value) > MAX_INPUTS:
                raise invalid(f"{name} has {len(value)} texts, more than {MAX_INPUTS}", name, "too_many_items")
            sizes = _sizes(name, value)
        elif name == "prompt":
            if len(value) > max_prompts and isinstance(value[0], list | str):
                raise invalid(f"{len(value)} prompts are more than {max_prompts} (max_choices)", name)
            sizes |= _sizes(name, value[:longest])
        elif name in _LISTS_OF_PARTS:
            parts = [item["content"] for item in value[:longest] if isinstance(item, dict) and "content" in item]
            sizes[name] = max(len(value), sum(len(part) for part in parts if isinstance(part, list)))
        for place, size in sizes.items():
            if size > longest:
                message = f"This model's maximum context length is {longest} tokens; {place} has {size} items"
                raise invalid(message, place, "context_length_exceeded")


def _sizes(name: str, items: list[Any]) -> dict[str, int]:
    """Of the lists in a list, by their places."""
    return {f"{name}.{number}": len(item) for number, item in enumerate(items) if isinstance(item, list)}


def _of_validation(errors: list[Any], kind: type[Body], data: dict[str, Any]) -> ApiError:
    """Reports the deepest error: in a union, the alternative that the input resembles most."""
    found = max(errors, key=lambda error: len(error["loc"]))
    fault, place = found["type"], _place(found["loc"], data, is_missing=found["type"] == "missing")
    if fault in ("refused_field", "too_many_fields"):
        code = "unsupported_parameter" if fault == "refused_field" else "too_many_items"
        return invalid(found["msg"], found["ctx"].get("field"), code)
    if place and place[0] in kind.forms and any("[" in str(part) for part in found["loc"]):
        return invalid(f"{place[0]} must be {kind.forms[place[0]]}", place[0])
    if fault == "union_tag_invalid" and "content" in place and _is_no_text(found["ctx"]["tag"], kind):
        given = str(found["ctx"]["tag"])[:MAX_SHOWN]
        return invalid(f"this model takes text only; {'.'.join(place)} is {given}", ".".join([*place, "type"]))
    if fault.startswith("union_tag"):
        place.append(found["ctx"]["discriminator"].strip("'"))
    param = ".".join(place) or None
    if fault == "extra_forbidden":
        return invalid(f"unknown or unsupported parameter: {param}", param, "unknown_parameter")
    if fault in ("missing", "union_tag_not_found"):
        return invalid(f"{param} is missing", param)
    if fault == "union_tag_invalid":
        return invalid(f"{param} must be one of {found['ctx']['expected_tags']}", param)
    if fault == "literal_error" and place[0] == "tools":
        given, expected = str(found["input"])[:MAX_SHOWN], found["ctx"]["expected"]
        message = f"{param}: only functions can be called here; it must be {expected}, not {given!r}"
        return invalid(message, param)
    if fault == "literal_error" and "content" in place:
        given = str(found["input"])[:MAX_SHOWN]
        if not _is_no_text(given, kind):
            return invalid(f"{param} must be {found['ctx']['expected']}, not {given!r}", param)
        return invalid(f"this model takes text only; {'.'.join(place[:-1])} is {given}", param)
    if fault in ("model_type", "model_attributes_type"):
        return invalid(f"{param}: must be an object, such as {{...}}", param)
    return invalid(f"{param}: {found['msg']}", param)


def _is_no_text(tag: str, kind: type[Body]) -> bool:
    """The type of a part of a message is none of text, of any API, and none that this one has at other places."""
    return tag not in _TEXTS and tag not in kind.part_types


def _place(loc: Sequence[str | int], data: Any, *, is_missing: bool) -> list[str]:
    """Without what pydantic adds of its own: names of types, and tags of unions. `is_missing`: the last one is."""
    place: list[str] = []
    for number, part in enumerate(loc, 1):
        is_there = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if is_there:
            data = data[part]
        if is_there or (is_missing and number == len(loc)):
            place.append(str(part))
    return place
