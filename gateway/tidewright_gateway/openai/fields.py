"""Which fields a request may have: honoured, accepted without effect, or refused by name.

null means "not given" for every field of the API's own objects; schemas and other free objects are left as they are.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

Number = Annotated[StrictFloat, Field(allow_inf_nan=False)] | StrictInt
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list whose validation stops at the first invalid item, to bound the cost of errors."""

MAX_FIELDS = 256  # of one object
_MAX_NAMES = 32  # that are told of ignored fields
_HEADER_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass
class FieldPolicy:
    """What happens to fields without effect in one request."""

    ignores_unknown: bool = False
    """Fields that nobody knows are ignored instead of refused."""
    ignored: dict[str, None] = field(default_factory=dict)
    """Names of the fields that had no effect, in order."""

    def ignore(self, name: str) -> None:
        if len(self.ignored) < _MAX_NAMES and _HEADER_SAFE.fullmatch(name):
            self.ignored[name] = None


class ApiObject(BaseModel):
    """An object of a request. A field that is neither declared nor in `without_effect` is refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Names of fields that are accepted although nothing depends on them."""
    refused: ClassVar[Mapping[str, str]] = {}
    """Names of fields that other servers have and that would change the answer, each with what to do instead."""
    place: ClassVar[str] = ""
    """What comes before the names of its fields when they are told."""

    @model_validator(mode="before")
    @classmethod
    def _keep_what_counts(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_FIELDS:
            message = f"an object has {len(given)} fields, more than any may have"
            raise PydanticCustomError("too_many_fields", "{message}", {"message": message})
        policy = info.context if isinstance(info.context, FieldPolicy) else FieldPolicy()
        kept: dict[str, Any] = {}
        for name, value in given.items():
            if value is None:
                continue
            if name in cls.refused:
                message = f"{cls.place}{name} is not supported: {cls.refused[name]}"
                raise PydanticCustomError("refused_field", "{message}", {"message": message, "field": name})
            if name in cls.without_effect or (policy.ignores_unknown and name not in _names(cls)):
                policy.ignore(cls.place + name)
            else:
                kept[name] = value
        return kept


@functools.cache
def _names(kind: type[ApiObject]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in kind.model_fields.items())
