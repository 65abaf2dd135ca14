"""Options in a YAML file: read, and what is wrong with it said in one line that names the place."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from tidewright import __version__

VERSION = 1
"""Of both files, serving.yaml and gateway.yaml: goes up when an option is renamed, removed or means something else."""
VERSION_KEY = "version"


class _Loader(yaml.SafeLoader):
    """PyYAML takes the last of two equal names and drops the other, with all that stands below it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} a second time", key.start_mark)
                names.add(key.value)
        return super().construct_mapping(node, deep)


def read_options(path: Path, groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The options that the file sets, by name; their values are not looked at, except for that of `version`.

    Args:
        groups: the options that there are, by the group that they stand in; those of the group "" stand by themselves.

    Raises:
        ValueError: it can't be read or understood; the message names the file, and what to change.
    """
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeError:
        raise ValueError(f"{path}: is not UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{path}{line}: not YAML: {problem}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        how = "a line each, such as `model: smollm2-135m`"
        if "" not in groups:
            how = "in groups, such as `server: {port: 8080}`"
        raise ValueError(f"{path}: must have options, {how}")
    found = dict(found)
    _check_version(found.pop(VERSION_KEY, VERSION), path)
    top = [*groups.get("", ()), *(name for name in groups if name)]
    options: dict[str, Any] = {}
    for name, value in found.items():
        if name not in top:
            raise ValueError(f"{path}: {_unknown(name, '', groups)}")
        if name not in groups:
            options[name] = value
        elif isinstance(value, dict):
            for option, given in value.items():
                if option not in groups[name]:
                    raise ValueError(f"{path}: {_unknown(option, name, groups)}")
                options[option] = given
        elif value is not None:
            raise ValueError(f"{path}: {name} must have options of its own, a line each, indented")
    return options


def sources(
    first: Sequence[PydanticBaseSettingsSource],
    settings: type[BaseSettings],
    variable: str,
    groups: Mapping[str, Sequence[str]],
) -> tuple[PydanticBaseSettingsSource, ...]:
    """The `first`, and the file that this environment variable names, if it names one; `groups` as for `read_options`.

    Raises as `read_options`.
    """
    if not (file := os.environ.get(variable)):
        return tuple(first)
    return (*first, InitSettingsSource(settings, read_options(Path(file), groups)))


def as_file(options: Mapping[str, Any]) -> str:
    """The text of a file that sets these options, groups among them."""
    return yaml.safe_dump({VERSION_KEY: VERSION, **options}, sort_keys=False)


def _check_version(given: Any, path: Path) -> None:
    """A file without one is of the first."""
    if type(given) is int and given == VERSION:
        return
    if type(given) is int and given > VERSION:
        raise ValueError(
            f"{path}: is of version {given}, and this Tidewright ({__version__}) reads version {VERSION} only: start "
            "the newer Tidewright that the file is for, or use the file from before the upgrade"
        )
    raise ValueError(f"{path}: {VERSION_KEY} is {given!r}, but must be {VERSION}")


def _unknown(name: Any, group: str, groups: Mapping[str, Sequence[str]]) -> str:
    where = f" in {group}" if group else ""
    for other, options in groups.items():
        if name in options and other != group:
            return f"{name} belongs under {other}:, indented" if other else f"{name} belongs in no group"
    known = groups[group] if group else [*groups.get("", ()), *(one for one in groups if one)]
    close = difflib.get_close_matches(str(name), known, 1) or difflib.get_close_matches(
        str(name), [option for options in groups.values() for option in options], 1
    )
    return f"there is no option {name}{where}" + (f"; did you mean {close[0]}?" if close else "")
