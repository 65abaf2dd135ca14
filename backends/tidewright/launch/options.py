"""Flags made from a settings class, and the settings made from flags."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tidewright.served_models import split

S = TypeVar("S", bound=BaseModel)
Command = Callable[..., Any]

_TYPES = {int: "INTEGER", float: "NUMBER", bool: "BOOLEAN", str: "TEXT"}


def settings_options(settings: type[BaseModel]) -> Callable[[Command], Command]:
    """One flag for each field; unset flags leave the word to environment and file.

    `--model` may come several times: what follows the first becomes `models`, which has no flag.
    """

    def decorate(command: Command) -> Command:
        for name, field in reversed(settings.model_fields.items()):
            if name == "models":
                continue
            flag = "--" + name.replace("_", "-")
            text = field.description if field.default == "" else f"{field.description}  [default: {field.default}]"
            several: dict[str, Any] = {"multiple": True, "metavar": "[NAME=]SOURCE"} if name == "model" else {}
            given = {"default": None, "metavar": _type(field), "help": text, **several}
            command = click.option(flag, name, **given)(command)
        return command

    return decorate


def grouped(groups: Mapping[str, type[BaseModel]]) -> type[click.Command]:
    """A command whose help has its options in these groups; those of none come first."""

    class Grouped(click.Command):
        def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
            left = {param.name: record for param in self.params if (record := param.get_help_record(context))}
            parts = {
                name: [left.pop(field) for field in group.model_fields if field in left]
                for name, group in groups.items()
            }
            for name, records in {"Options": list(left.values()), **parts}.items():
                if records:
                    with formatter.section(name.capitalize()):
                        formatter.write_dl(records)

    return Grouped


def settings_from(settings: type[S], flags: Mapping[str, Any]) -> S:
    """Raises click.ClickException, which names what is wrong."""
    given = {name: value for name, value in flags.items() if value is not None}
    if models := given.pop("model", ()):
        name, given["model"] = split(models[0])
        if name:
            given.setdefault("served_model_name", name)
        if models[1:]:
            given["models"] = list(models[1:])
    try:
        return settings(**given)
    except ValidationError as error:
        raise click.ClickException("; ".join(map(_problem, error.errors()))) from None
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None


def _problem(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    place = ".".join(map(str, error["loc"]))  # what is about several options names them
    return f"{place}: {message}" if place else message


def _type(field: FieldInfo) -> str:
    """As help shows it. What is given stays text: the settings know its type and bounds."""
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        return f"[{'|'.join(map(str, get_args(kind)))}]"
    kinds: Sequence[Any] = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else [kind]
    return _TYPES.get(kinds[0], "TEXT")
