"""docs/compatibility.md names the fields without effect, and the refused ones, that the code has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tidewright_gateway.document.operations import OPERATIONS
from tidewright_gateway.openai.fields import ApiObject
from tidewright_gateway.openai.protocol import Body

BODIES = {path: one.body for (_, path), one in OPERATIONS.items() if one.body and issubclass(one.body, Body)}
PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"


def parts(kind: type[ApiObject]) -> Iterator[type[ApiObject]]:
    for one in kind.__subclasses__():
        yield one
        yield from parts(one)


def without_effect() -> list[str]:
    rows = []
    bodies = dict.fromkeys(BODIES.values())
    for kind in bodies:
        paths = ", ".join(f"`{path}`" for path, of_path in BODIES.items() if of_path is kind)
        if kind.without_effect:
            rows.append(f"| {paths} | {names(kind.without_effect)} |")
    found: dict[str, set[str]] = {}
    for kind in parts(ApiObject):
        if kind.place and "tidewright_gateway" in kind.__module__:
            found.setdefault(kind.place.rstrip("."), set()).update(kind.without_effect)
    rows += [f"| within `{place}` | {names(fields)} |" for place, fields in sorted(found.items()) if fields]
    return rows


def refused() -> list[str]:
    return [
        f"| `{path}` | `{name}` | {instead} |"
        for path, kind in BODIES.items()
        for name, instead in sorted(kind.refused.items())
    ]


def names(fields: set[str] | frozenset[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(fields))


def table(title: str) -> list[str]:
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][1:]


def test_fields_without_effect_are_those_of_the_code() -> None:
    assert table("Fields without effect") == without_effect()


def test_refused_fields_are_those_of_the_code() -> None:
    assert table("Refused fields") == refused()
