"""The API key of the commands that can go through a gateway: from a flag, a file or the environment."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

VARIABLE = "TIDEWRIGHT_KEY"
_KEY = re.compile(r"[\x21-\x7e]+")

_FLAG = click.option(
    "--key",
    metavar="KEY",
    help=f"API key, for a gateway that requires one. Others on this machine can see it here; better: --key-file, or "
    f"the environment variable {VARIABLE}.",
)
_FILE = click.option("--key-file", metavar="FILE", type=click.Path(), help="File with the API key.")


def key_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds both flags, and calls the command with `key`: a text or None."""

    @functools.wraps(command)
    def with_key(*arguments: Any, key: str | None, key_file: str | None, **options: Any) -> Any:
        return command(*arguments, key=_chosen(key, key_file), **options)

    return _FLAG(_FILE(with_key))


def _chosen(key: str | None, file: str | None) -> str | None:
    if key is not None and file is not None:
        raise click.UsageError("--key and --key-file both give a key; use one of them")
    if key is not None:
        return _checked(key, "--key")
    if file is not None:
        try:
            return _checked(Path(file).read_text(encoding="utf-8"), file)
        except (OSError, UnicodeDecodeError) as error:
            raise click.ClickException(f"can't read the key file {file}: {error}") from None
    found = os.environ.get(VARIABLE)
    return _checked(found, VARIABLE) if found else None


def _checked(text: str, source: str) -> str:
    """Without the line's end. Its text is in no message."""
    key = text.strip()
    if not _KEY.fullmatch(key):
        raise click.ClickException(f"{source} holds no API key: one is of printable ASCII characters without spaces")
    return key
