"""How answers are described. Answers are not made by these models, nor checked at run time: tests hold them to it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core.core_schema import CoreSchema, WithDefaultSchema

ABSENT: Any = None
"""The default of fields that not every answer has."""


class Shown(BaseModel):
    """An object of an answer. A later version may add fields: clients must allow for them."""

    model_config = ConfigDict(use_attribute_docstrings=True, defer_build=True)


class Schemas(GenerateJsonSchema):
    def default_schema(self, schema: WithDefaultSchema) -> JsonSchemaValue:
        # Without the default: some generators take a field that has one for a field that is always there.
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: CoreSchema) -> bool:
        return False  # it would only repeat the name
