"""Several models in one server: what they are called, and how their models in Triton are. Pure; no torch.

The first keeps the plain names `tokenizer`, `decoder`, `failsafe`, …; a further one named NAME has a chain of its own:
`tokenizer_NAME`, `decoder_NAME`, and `generate_NAME`, which is the one after the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator
from pydantic_settings import NoDecode

from tidewright.cache import EMBEDDED_MODEL, HUB_ID

MAX_NAME = 64  # characters
NAME = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}"
"""Of a further model: it is part of names in Triton, of paths and of URLs."""
RESERVED_NAMES = ("decoder", "direct", "failsafe", "fallback", "generate", "tokenizer")
"""Not of a further model: the first one's models in Triton are called so, or as one of its would be."""
MAX_MODELS = 16
SMALLER_SCHEMES = ("int8", "w8a8", "int4-g32", "int4-g64", "int4-g128", "stored")
"""Values of `--quantization` that a smaller variant may have."""
PARAMETER = "served_model"
"""Of a model in Triton: the name of the further model that it belongs to."""
_NAMED = re.compile(rf"({NAME})=(.+)", re.DOTALL)

Named = TypeVar("Named", bound="NamedModel")


def served_name(model: str) -> str:
    """What a model is called unless it is given a name: the last part of its source, without a revision."""
    hub_id = None if Path(model).exists() else HUB_ID.fullmatch(model)
    return Path(hub_id["repository"] if hub_id else model).name


def split(text: str) -> tuple[str, str]:
    """Name and source of `NAME=SOURCE` or `SOURCE`; the name is empty if there is none."""
    found = None if Path(text).exists() else _NAMED.fullmatch(text)
    return (found[1], found[2]) if found else ("", text)


FIRST_DECODER = "decoder"
"""The Triton model that generates for the first model."""

SMALLER_SHARE = 0.25
"""Of the KV cache's memory, for a smaller variant."""


def smaller_name(model_name: str) -> str:
    """Of a model's smaller variant; a further model may be called so, whatever characters the model's own name has."""
    ending = "-small"
    own = re.sub(r"[^A-Za-z0-9._-]+", "-", model_name).lstrip("._-")[: MAX_NAME - len(ending)]
    return f"{own or 'model'}{ending}"


def with_smaller_variant(model: str, model_name: str, models: object, variant: str, quantization: str) -> list[Any]:
    """`models`, and a variant of `model`: with its weights in the scheme `variant`, or made elsewhere at that path.

    `quantization`: the model's own scheme. Raises ValueError: there is no such variant.
    """
    given = list(_listed(models or []))
    name = smaller_name(model_name)
    if any(ServedModel.model_validate(one).name == name for one in given):
        return given
    values = f"write one of {', '.join(SMALLER_SCHEMES)}, or a folder, a .gguf file or a hub id of another model"
    if variant == quantization:
        raise ValueError(f"smaller_variant is {variant}, as quantization is: it would be no smaller; {values}")
    if not (variant in SMALLER_SCHEMES or variant == EMBEDDED_MODEL or "/" in variant or Path(variant).exists()):
        raise ValueError(f"smaller_variant can't be {variant!r}; {values}")
    scheme = {"quantization": variant} if variant in SMALLER_SCHEMES else {}
    return [
        *given,
        {"name": name, "model": model if scheme else variant, "kv_cache_share": SMALLER_SHARE, **scheme},
    ]


def decoder_of(name: str) -> str:
    """The Triton model that generates for a further model."""
    return f"{FIRST_DECODER}_{name}"


def further_name(triton_name: str) -> str:
    """The further model whose decoder this is in Triton; empty: it is the first's, or no decoder."""
    prefix = decoder_of("")
    return triton_name.removeprefix(prefix) if triton_name.startswith(prefix) else ""


def chain_of(name: str) -> tuple[str, str, str]:
    """All Triton models of a further model; each needs only those before it."""
    return f"tokenizer_{name}", decoder_of(name), f"generate_{name}"


def changed_with(decoder: str) -> tuple[str, ...]:
    """What is loaded and unloaded with a decoder, itself too. The first one's failsafe stays, for the fallback."""
    name = further_name(decoder)
    return chain_of(name) if name else (decoder,)


class NamedModel(BaseModel):
    """A model beside the first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=rf"^{NAME}$")
    model: str = Field(min_length=1)
    """Its source, as the option `model` has it."""

    @model_validator(mode="before")
    @classmethod
    def _has_a_name(cls, given: Any) -> Any:
        if isinstance(given, str):
            name, model = split(given)
            given = {"name": name, "model": model}
        if not isinstance(given, dict) or given.get("name") or not isinstance(given.get("model"), str):
            return given
        name = served_name(given["model"])
        if not re.fullmatch(NAME, name):
            raise ValueError(
                f"{given['model']!r} needs a name of letters, digits, '.', '_' and '-': write NAME={given['model']}"
            )
        return {**given, "name": name}


class ServedModel(NamedModel):
    """With what `tidewright serve` has for it alone."""

    load: bool = True
    """From the start on; else somebody loads it later (`tidewright model load`)."""
    options: dict[str, Any] = {}
    """Options of the server that differ for it."""

    @model_validator(mode="before")
    @classmethod
    def _others_are_options(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = {name: value for name, value in given.items() if name in cls.model_fields}
        return {**known, "options": {**known.get("options", {}), **{k: v for k, v in given.items() if k not in known}}}

    @model_serializer
    def _as_it_is_written(self) -> dict[str, Any]:
        return {"name": self.name, "model": self.model, "load": self.load, **self.options}


def _listed(given: Any) -> Any:
    """A list, as YAML has it, or text of a flag or variable: JSON, or names and sources with commas between."""
    if not isinstance(given, str):
        return given
    if given.lstrip().startswith("["):
        try:
            return json.loads(given)
        except ValueError as error:
            raise ValueError(f"is not valid JSON: {error}") from None
    return [part.strip() for part in given.split(",") if part.strip()]


Listed = Annotated[list[Named], NoDecode, BeforeValidator(_listed), Field(max_length=MAX_MODELS - 1)]
"""An option whose value is a list of models."""


def check_names(first: str, others: Iterable[NamedModel]) -> None:
    """Raises ValueError: two have one name, or one has that of a model in Triton."""
    seen = {first}
    for one in others:
        if one.name in RESERVED_NAMES:
            raise ValueError(
                f"{one.name!r} can't be the name of a model beside the first, which has models in Triton by that name; "
                f"give it another: --model NAME={one.model}"
            )
        if one.name in seen:
            raise ValueError(f"two models are named {one.name!r}; give one another name: --model NAME={one.model}")
        seen.add(one.name)
