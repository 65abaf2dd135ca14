"""docs/websocket.md says what the messages are."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from tidewright_gateway.websocket import messages

PAGE = (Path(__file__).parents[2] / "docs" / "websocket.md").read_text()


def part(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    ("title", "kinds"), [("From the client", messages.CLIENT), ("From the server", messages.SERVER)]
)
def test_every_field_is_in_the_table(title: str, kinds: tuple[type[msgspec.Struct], ...]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (?:`(\w+)`)? ?\| (yes|no)? ?\|", part(title), re.MULTILINE)
    expected = []
    for kind in kinds:
        fields = msgspec.structs.fields(kind)
        for field in fields:
            expected.append((kind.__name__.lower(), field.name, "yes" if field.required else "no"))
        if not fields:
            expected.append((kind.__name__.lower(), "", ""))
    assert rows == expected


@pytest.mark.parametrize(
    ("title", "kind"), [("From the client", messages.FromClient), ("From the server", messages.FromServer)]
)
def test_the_examples_are_messages_and_show_each_type(title: str, kind: type) -> None:
    lines = part(title).split("```json\n")[1].split("```")[0].splitlines()
    shown = [msgspec.json.decode(line, type=kind) for line in lines]
    assert {type(message) for message in shown} == set(kind.__args__)
