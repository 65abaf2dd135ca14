"""README and docs: every command, option, file and anchor that they name exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import click
import pytest

from helpers.documents import anchors
from tidewright.launch.cli import main
from tidewright.resilience.outcome import Outcome, Verdict

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
        *(ROOT / "docs").glob("*.md"),
        *(path for folder in ("terraform", "clients") for path in (ROOT / folder).rglob("*.md")),
    ]
)
FOLDERS = (
    "backends",
    "gateway",
    "tests",
    "benchmarks",
    "clients",
    "docs",
    "model_repository",
    "ensemble",
    "monitoring",
    "docker",
    "k8s",
    "terraform",
    "loadtests",
    ".ci",
)
FILES = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*")} | {
    path.name for path in ROOT.iterdir()
}
BENCHMARKS = sorted([*(ROOT / "benchmarks").rglob("*.py"), ROOT / "loadtests" / "cli.py"])
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
IGNORED = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
# Of the programs that stand in the documents beside ours.
OTHERS_OPTIONS = {"--grpc-use-ssl", "--trace-config", "--exit-timeout-secs", "--build-arg"}
PATH = re.compile(rf"[\w./*-]+\.(py|md|cpp|h|sh|pbtxt)|[\w.-]+(/[\w.*-]+)*/|({'|'.join(FOLDERS)})/[\w./*-]+")


def code_of(text: str) -> tuple[list[str], list[str]]:
    """What stands in backticks, and the lines of the blocks."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)], lines


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command line."""
    spans, lines = code_of(text)
    for line in [*spans, *lines]:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a line of a string over several
            continue
        if words:
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def options_in(script: Path) -> set[str]:
    """Of one that uses argparse or click."""
    return set(re.findall(r'"(--[a-z-]+)"', script.read_text()))


def options_of(command: click.Command) -> set[str]:
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}


def commands_of(command: click.Command) -> dict[str, click.Command]:
    """Also of a group that imports them when they are asked for."""
    if not isinstance(command, click.Group):
        return {}
    context = click.Context(command)
    found = {name: command.get_command(context, name) for name in command.list_commands(context)}
    return {name: one for name, one in found.items() if one}


def all_commands(command: click.Command = main) -> Iterator[click.Command]:
    yield command
    for one in commands_of(command).values():
        yield from all_commands(one)


def wrong_in_command(words: list[str]) -> list[str]:
    """What there is not, of a command line."""
    program, rest = words[0], words[1:]
    if program == "tidewright":
        command: click.Command = main
        while rest and (below := commands_of(command)) and not rest[0].startswith("-"):
            if rest[0] not in below:
                return [rest[0]]
            command, rest = below[rest[0]], rest[1:]
        return [w for w in rest if w.startswith("--") and w.partition("=")[0] not in options_of(command)]
    if program == "make":
        return [word for word in rest if re.fullmatch(r"[a-z-]+", word) and word not in TARGETS]
    if (
        program == "python"
        and rest[:1] == ["-m"]
        and rest[1].partition(".")[0] in ("benchmarks", "loadtests", "tidewright")
    ):
        module = rest[1].replace(".", "/")
        return [] if {f"{module}.py", f"backends/{module}/__main__.py", f"{module}/__main__.py"} & FILES else [rest[1]]
    if program in ("python", "pytest"):
        return [word for word in rest if word.endswith(".py") and word not in FILES]
    return []


def is_file(path: str) -> bool:
    """Whole, or by its end, as docs name files of a package; a pattern must fit something."""
    pattern = re.compile("(.*/)?" + re.escape(path.rstrip("/")).replace(r"\*", "[^/]*"))
    return any(map(pattern.fullmatch, FILES)) or path.rstrip("/") in IGNORED


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_it_names_exists(document: Path) -> None:
    text = document.read_text()
    wrong = [(" ".join(words), bad) for words in commands(text) if (bad := wrong_in_command(words))]
    spans, _ = code_of(text)
    wrong += [(span, ["no such file"]) for span in spans if PATH.fullmatch(span) and not is_file(span)]
    known = OTHERS_OPTIONS.union(*map(options_of, all_commands()), *map(options_in, BENCHMARKS))
    options = [re.split(r"[ =]", span)[0] for span in spans if span.startswith("--")]
    wrong += [(option, ["no such option"]) for option in options if option not in known]
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_links_lead_somewhere(document: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not link.startswith(("http:", "https:")):
            path, _, anchor = link.partition("#")
            target = (document.parent / unquote(path)) if path else document
            if not target.exists() or (anchor and anchor not in anchors(target)):
                wrong.append(link)
    assert not wrong


@pytest.mark.parametrize(
    "words",
    [
        "tidewright serf",
        "tidewright keys make",
        "tidewright serve --no-such-flag",
        "tidewright serve --http-prt=1",
        "make testt",
        "python -m benchmarks.none",
        "python docs/none.py",
    ],
)
def test_what_does_not_exist_is_found(words: str) -> None:
    assert wrong_in_command(words.split())


def test_files_and_anchors_that_do_not_exist_are_found(tmp_path: Path) -> None:
    assert is_file("engine/scheduler.py")
    assert is_file("devices/cpu/source/*.cpp")
    assert is_file("launch/")
    assert not is_file("ngine/scheduler.py")
    assert not is_file("lunch/")
    assert PATH.fullmatch("tests/gateway")
    document = tmp_path / "it.md"
    document.write_text("# One `two`, three\n```\n# no heading\n```\n## A\n## A\n")
    assert anchors(document) == {"one-two-three", "a", "a-1"}


@pytest.mark.parametrize("verdict", Verdict)
def test_resilience_names_every_outcome_with_its_verdict(verdict: Verdict) -> None:
    counts_as = {Verdict.SUCCESS: "success", Verdict.FAILURE: "failure", Verdict.IGNORED: "nothing"}[verdict]
    (row,) = re.findall(
        rf"^\| (.*) \| {counts_as}[:|\s].*$", (ROOT / "docs" / "resilience.md").read_text(), re.MULTILINE
    )
    assert re.findall(r"`(\w+)`", row) == [outcome.name for outcome in Outcome if outcome.verdict is verdict]


def test_the_reading_list_is_the_tree() -> None:
    """Its files are there, and as long as it says, to a tenth."""
    text = (ROOT / "docs" / "architecture.md").read_text().partition("\n## Where to read\n")[2]
    listed, _, _ = text.partition("\nAround it")
    sizes = {}
    for row in re.findall(r"^\| (`.*?) \|", listed, re.MULTILINE):
        folder = ""
        for name in re.findall(r"`(.*?)`", row):
            folder = name.rpartition("/")[0] or folder
            path = Path(folder, name.rpartition("/")[2])
            sizes[str(path)] = len((ROOT / "backends" / "tidewright" / path).read_text().splitlines())
    in_order = list(sizes)
    of_engine = sum(sizes[path] for path in in_order[in_order.index("engine/messages.py") :])
    said = [int(number.replace(",", "")) for number in re.findall(r"[\d,]{5,}", listed)]
    assert said == pytest.approx([sum(sizes.values()), of_engine], rel=0.1)
