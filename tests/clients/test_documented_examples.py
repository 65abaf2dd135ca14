"""docs/clients.md and the clients' READMEs: the code in them is that of the examples, which tests run."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Of each language, the examples.
EXAMPLES = {"python": "examples/*.py", "go": "examples/*/main.go", "rust": "examples/*.rs"}
# A line that ends with a link to a file and a colon, and the block below it.
_SHOWN = re.compile(r"\]\((?P<file>[^)\s]+)\):\n\n```\w+\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def shown(document: Path) -> list[tuple[Path, str]]:
    text = document.read_text()
    return [((document.parent / found["file"]).resolve(), found["code"]) for found in _SHOWN.finditer(text)]


def is_part(code: str, of: str) -> bool:
    """Lines that follow each other there, with the indentation that all have taken away."""
    lines, wanted = of.expandtabs(4).splitlines(), code.expandtabs(4).splitlines()
    parts = (lines[at : at + len(wanted)] for at in range(len(lines)))
    return any(textwrap.dedent("\n".join(part)).splitlines() == wanted for part in parts)


@pytest.mark.parametrize("document", [ROOT / "docs" / "clients.md", *sorted((ROOT / "clients").glob("*/README.md"))])
def test_code_below_a_link_is_part_of_the_file(document: Path) -> None:
    for file, code in shown(document):
        assert is_part(code, file.read_text()), f"{document} shows other code than {file}"


@pytest.mark.parametrize("language", EXAMPLES)
def test_every_example_is_in_the_documents(language: str) -> None:
    examples = set((ROOT / "clients" / language).glob(EXAMPLES[language]))
    assert examples
    assert examples <= {file for file, _ in shown(ROOT / "docs" / "clients.md")}


def test_other_code_is_found() -> None:
    assert is_part("a()\nb()\n", "def it():\n    a()\n    b()\n    c()\n")
    assert is_part("if a:\n\tb()\n", "\tif a:\n\t\tb()\n")
    assert not is_part("a()\nc()\n", "def it():\n    a()\n    b()\n    c()\n")
