"""Flags made from a settings class, and the settings made from flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tidewright.config import options_in_order
from tidewright.resilience.config import ResilienceSettings

S = TypeVar("S", bound=ResilienceSettings)
Command = Callable[..., Any]


def settings_options(settings: type[ResilienceSettings]) -> Callable[[Command], Command]:
    """One flag for each field; unset flags leave the word to environment and file."""

    def decorate(command: Command) -> Command:
        for name, field in reversed(options_in_order(settings)):
            flag = "--" + name.replace("_", "-")
            command = click.option(flag, name, default=None, help=f"{field.description}  [default: {field.default}]")(
                command
            )
        return command

    return decorate


def settings_from(settings: type[S], flags: Mapping[str, str | None]) -> S:
    """Raises click.ClickException, which names what is wrong."""
    try:
        return settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise click.ClickException("; ".join(map(_problem, error.errors()))) from None
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None


def _problem(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    place = ".".join(map(str, error["loc"]))  # what is about several options names them
    return f"{place}: {message}" if place else message
