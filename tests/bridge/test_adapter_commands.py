"""Commands about LoRA adapters against a scripted bridge: what is refused, when it is answered, what is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tidewright.bridge.adapter_commands import AdapterCommands, AdapterStartError
from tidewright.bridge.adapters import Adapter, Done
from tidewright.errors import InvalidRequestError, RequestError
from tidewright.schema import MAX_ADAPTERS_KNOWN, AdapterStatus


class ScriptedBridge:
    def __init__(self) -> None:
        self.adapters: list[Adapter] = []
        self.asked: list[str] = []
        self.errors: dict[str, str] = {}
        self.pending: list[Callable[[], None]] = []
        self.waits = False
        """Loads are answered only by `go_on`."""

    def load_adapter(self, name: str, path: str, done: Done) -> None:
        self.asked.append(f"load {name} {path}")

        def answer() -> None:
            if error := self.errors.get(name):
                return done(InvalidRequestError(error))
            self.adapters.append(Adapter(name, path, "loaded", 8, 100))
            done(self.adapters[-1])

        self.pending.append(answer) if self.waits else answer()

    def unload_adapter(self, name: str, done: Done) -> None:
        self.asked.append(f"unload {name}")
        self.adapters = [adapter for adapter in self.adapters if adapter.name != name]

    def go_on(self) -> None:
        while self.pending:
            self.pending.pop(0)()


@pytest.fixture
def bridge() -> ScriptedBridge:
    return ScriptedBridge()


@pytest.fixture
def commands(bridge: ScriptedBridge) -> AdapterCommands:
    return AdapterCommands(bridge, "/adapters")


def test_a_load_is_answered_when_it_is_done_and_its_path_is_below_the_folder(
    bridge: ScriptedBridge, commands: AdapterCommands
) -> None:
    answers: list[RequestError | None] = []
    bridge.waits = True
    commands.load('{"name": "sql", "path": "sql-v2", "at": 5}', answers.append)
    assert (answers, commands.statuses) == ([], [])
    bridge.go_on()
    assert answers == [None]
    assert bridge.asked == ["load sql /adapters/sql-v2"]
    assert commands.statuses == [AdapterStatus("sql", "/adapters/sql-v2", True, 5)]
    commands.load('{"name": "sql", "path": "/adapters/sql-v2", "at": 6}', answers.append)  # by a second gateway
    assert (answers, len(bridge.asked)) == ([None, None], 1)
    commands.unload('{"name": "sql", "at": 7}', answers.append)
    assert (answers[2:], bridge.asked[1:]) == ([None], ["unload sql"])
    assert commands.statuses == [AdapterStatus("sql", "/adapters/sql-v2", False, 7)]


def test_no_adapter_takes_the_name_of_a_model(bridge: ScriptedBridge) -> None:
    commands = AdapterCommands(bridge, "/adapters", ["tide", "q"])
    for name in ("tide", "q"):
        with pytest.raises(InvalidRequestError, match=f"'{name}' is a model itself; choose another name"):
            commands.load(f'{{"name": "{name}", "path": "p"}}', lambda _: None)
    assert bridge.asked == []


def test_an_adapter_that_the_engine_lost_is_not_told_as_loaded(
    bridge: ScriptedBridge, commands: AdapterCommands
) -> None:
    commands.load('{"name": "sql", "path": "p"}', lambda _: None)
    (status,) = commands.statuses or []
    assert status.at > 1e9  # now
    bridge.adapters.clear()
    assert commands.statuses == []


def test_a_refusal_is_handed_on_and_leaves_nothing(bridge: ScriptedBridge, commands: AdapterCommands) -> None:
    answers: list[RequestError | None] = []
    bridge.errors["bad"] = "its rank is 512"
    commands.load('{"name": "bad", "path": "p"}', answers.append)
    assert [str(answer) for answer in answers] == ["its rank is 512"]
    assert commands.statuses == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "must be JSON"),
        ('{"path": "p"}', "missing required field `name`"),
        ('{"name": "a b", "path": "p"}', "matching regex"),
        ('{"name": "a", "path": 5}', "`$.path`"),
        ('{"name": "a", "path": "p", "rank": 5}', "unknown field `rank`"),
        ('{"name": "a"}', "needs a path"),
        ('{"name": "a", "path": "p", "at": 1e11}', "ahead of this server's clock, more than 3600"),
        ('{"name": "a", "path": "%s"}' % ("p" * 4097), "length <= 4096"),
        ('{"name": "a", "path": "%s"}' % ("p" * 9000), "more than 8192"),
        ('{"name": "a", "path": "\ud800"}', "must be JSON"),
    ],
)
def test_what_is_no_order_is_refused_at_once(
    bridge: ScriptedBridge, commands: AdapterCommands, text: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        commands.load(text, lambda _: None)
    assert message in str(caught.value)
    assert bridge.asked == []


def test_a_server_without_a_folder_serves_none(bridge: ScriptedBridge) -> None:
    commands = AdapterCommands(bridge, "")
    assert commands.statuses is None
    with pytest.raises(InvalidRequestError, match="--adapter-folder"):
        commands.load('{"name": "a", "path": "p"}', lambda _: None)


def test_an_unknown_one_can_not_be_unloaded(commands: AdapterCommands) -> None:
    commands.load('{"name": "law", "path": "p"}', lambda _: None)
    with pytest.raises(InvalidRequestError, match=r"'sql'.*law"):
        commands.unload('{"name": "sql"}', lambda _: None)


def test_adapters_of_the_start_are_nobody_s_command_and_one_that_fails_fails_it(
    bridge: ScriptedBridge, commands: AdapterCommands
) -> None:
    commands.load_at_start({"sql": "sql-v2", "law": "/adapters/law"}, 5)
    assert commands.statuses == [
        AdapterStatus("sql", "/adapters/sql-v2", True, 0),
        AdapterStatus("law", "/adapters/law", True, 0),
    ]
    bridge.errors["bad"] = "its rank is 512"
    with pytest.raises(AdapterStartError, match="adapter bad can't be loaded from p: its rank is 512"):
        commands.load_at_start({"bad": "p"}, 5)
    bridge.waits = True
    with pytest.raises(AdapterStartError, match=r"not loaded within 0.01 s .*: slow"):
        commands.load_at_start({"slow": "p"}, 0.01)


def test_the_names_that_are_remembered_are_bounded(commands: AdapterCommands) -> None:
    for number in range(MAX_ADAPTERS_KNOWN + 5):
        commands.load(f'{{"name": "a{number}", "path": "p"}}', lambda _: None)
        if number:
            commands.unload(f'{{"name": "a{number}"}}', lambda _: None)
    statuses = commands.statuses or []
    assert len(statuses) == MAX_ADAPTERS_KNOWN
    assert [status.name for status in statuses if status.loaded] == ["a0"]
    for number in range(1, MAX_ADAPTERS_KNOWN):
        commands.load(f'{{"name": "b{number}", "path": "p"}}', lambda _: None)
    commands.unload('{"name": "b7"}', lambda _: None)
    statuses = commands.statuses or []
    assert (len(statuses), sum(status.loaded for status in statuses)) == (MAX_ADAPTERS_KNOWN, MAX_ADAPTERS_KNOWN - 1)
