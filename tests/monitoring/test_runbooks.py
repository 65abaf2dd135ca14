"""docs/troubleshooting.md has a runbook for each alert, with a first command, and a row for each error code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from helpers.documents import anchors

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
RUNBOOKS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^#|\Z)", re.sub(r"(?m)^#(?= )", "", PAGE), re.MULTILINE | re.DOTALL))
ALERTS = {
    rule["alert"]
    for group in yaml.safe_load((ROOT / "monitoring" / "rules" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
}


def strings(node: ast.expr | None) -> Iterator[str]:
    """That an expression can be; of `"a" if x else "b"` both."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from strings(node.body)
        yield from strings(node.orelse)


def codes_in(text: str) -> set[str]:
    """Error codes in a module: arguments, defaults and variables `code`, and the third argument of `invalid(...)`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            values = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            for value in values + (node.args[2:3] if name == "invalid" else []):
                found.update(strings(value))
        elif isinstance(node, ast.Assign):
            if any(isinstance(target, ast.Name) and target.id == "code" for target in node.targets):
                found.update(strings(node.value))
        elif isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args
            for argument, default in zip(reversed(arguments), reversed(node.args.defaults), strict=False):
                if argument.arg == "code":
                    found.update(strings(default))
    return found


CODES = set[str]().union(*map(codes_in, (path.read_text() for path in (ROOT / "gateway").rglob("*.py"))))


def test_codes_are_found() -> None:
    text = """
def f(a, code="one"):
    raise E(400, code="two")
code = "three" if x else "four"
invalid("m", "p", "five")
"""
    assert codes_in(text) == {"one", "two", "three", "four", "five"}


def test_each_alert_has_a_runbook_and_no_other() -> None:
    assert set(RUNBOOKS) == ALERTS


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_a_runbook_says_what_to_do_first(alert: str) -> None:
    """A command, or another alert's section."""
    assert "```bash" in RUNBOOKS[alert] or re.search(r"\]\(#\w+\)", RUNBOOKS[alert])


def test_what_diagnose_names_exists() -> None:
    findings = (ROOT / "backends" / "tidewright" / "observe" / "findings.py").read_text()
    named = {f"error-{code.replace('_', '-')}" for code in CODES} | set(re.findall(r'"([a-z]+(?:-[a-z]+)+)"', findings))
    assert len(named) > len(CODES) + 20
    assert named <= anchors(ROOT / "docs" / "troubleshooting.md")


def test_each_error_code_has_a_row_and_no_other() -> None:
    written = re.findall(r"^\| <a [^|]*</a>`(\w+)` \| \d+ \|", PAGE, re.MULTILINE)
    assert written == sorted(set(written))
    assert set(written) == CODES
