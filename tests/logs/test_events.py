"""The code uses the events of the catalogue and no others, as docs/logging.md; good news is no warning."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidewright.logs import EVENTS, FIELDS, event
from tidewright_gateway import trouble
from tidewright_gateway.http import access_log

ROOT = Path(__file__).parent.parent.parent
SOURCES = [
    path for folder in ("backends", "gateway", "ensemble", "model_repository") for path in (ROOT / folder).rglob("*.py")
]
DOCUMENT = (ROOT / "docs" / "logging.md").read_text()
GOOD_NEWS = re.compile(r"\bagain$|\bwell\b|recover|reloaded|is back|healthy")


def calls() -> Iterator[tuple[Path, ast.Call]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path, node


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def is_log(call: ast.Call) -> bool:
    return getattr(getattr(call.func, "value", None), "id", "") in ("log", "logger")


def texts_in(node: ast.AST) -> Iterator[str]:
    for one in ast.walk(node):
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
            yield one.value


def test_all_events_of_the_code_are_in_the_catalogue_and_all_of_it_are_used() -> None:
    used = {"internal_error", "note", "output"}  # given by the formatter and the relay
    for path, call in calls():
        if not re.search(r"tidewright\.logs|import logs|Terminal", path.read_text()):
            continue
        if getattr(call.func, "id", "") == "event" or ast.unparse(call.func) == "logs.event":
            used |= set(texts_in(call.args[0]))
        elif ast.unparse(call.func).startswith("terminal.") and len(call.args) > 1:
            used |= set(texts_in(call.args[1]))
    used |= {*trouble.KEYS, *trouble.NO_KEYS, *trouble.STORE}
    used |= {text for text in texts_in(ast.parse(Path(access_log.__file__).read_text())) if text in EVENTS}
    assert used == EVENTS.keys()


def test_an_unknown_event_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        event("no_such_event")


def table(heading: str) -> dict[str, str]:
    part = DOCUMENT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", part, re.MULTILINE))


@pytest.mark.parametrize(
    ("heading", "catalogue"), [("Fields", FIELDS), ("Events", EVENTS), ("The access log", access_log.FIELDS)]
)
def test_the_document_has_the_catalogue(heading: str, catalogue: dict[str, str]) -> None:
    assert table(heading) == catalogue


def test_good_news_is_no_warning() -> None:
    wrong = [
        (path.name, text)
        for path, call in calls()
        if is_log(call) and name_of(call) in ("warning", "error")
        for text in texts_in(call.args[0])
        if GOOD_NEWS.search(text)
    ]
    assert not wrong


def test_no_line_is_made_from_what_a_request_says_or_gets() -> None:
    """Names that hold prompts, texts, keys or bodies may not be arguments of a log call."""
    names = "prompt|prompts|text|texts|body|content|messages|credential|token|token_ids|key|secret|chunk|plan|_plan"
    secret = re.compile(f"^({names})$")
    wrong = []
    for path, call in calls():
        if is_log(call) and name_of(call) in ("debug", "info", "warning", "error", "exception", "critical", "log"):
            for argument in [*call.args[1:], *(word.value for word in call.keywords)]:
                last = argument.attr if isinstance(argument, ast.Attribute) else getattr(argument, "id", "")
                if secret.match(last):
                    wrong.append((path.name, call.lineno, last))
    wrong = [one for one in wrong if one[0] != "terminal.py"]  # what serve says of itself
    assert not wrong
