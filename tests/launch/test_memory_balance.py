"""launch/memory_balance.py on scripted engines: who gives has given before another gets, and nothing is lost."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from helpers.scripted_triton import DEAD, ScriptedTriton, scripted_triton
from tidewright.launch import memory_balance
from tidewright.launch.memory_balance import MemoryBalance
from tidewright.memory.account import MemoryAccount
from tidewright.served_models import ServedModel

PATIENCE = 20.0  # seconds
FIRST, OTHER = "decoder", "decoder_other"
WHOLE, BLOCK, LEAST = 12800, 10, 400


@dataclass
class Engine:
    most: int
    wanted: int = 0
    state: str = "READY"
    slow: int = 0
    """Questions about its memory until it has done what it was told."""
    refuses: bool = False
    told: list[int] = field(default_factory=list)

    @property
    def account(self) -> MemoryAccount:
        sizes = {"kv_least": LEAST, "kv_most": self.most, "kv_target": self.most, "kv_room": WHOLE}
        used = min(self.wanted, self.most)
        blocks = {"kv_used": used, "kv_free": self.most - used, "block": BLOCK, "kv_wanted": self.wanted}
        return MemoryAccount(self.most + 100, 100, **blocks, **sizes)


class Engines:
    """Of a scripted Triton. Raises in the test's thread what is over-committed."""

    def __init__(self, triton: ScriptedTriton, folder: Path) -> None:
        self.by_name = {FIRST: Engine(WHOLE // 2), OTHER: Engine(WHOLE // 2)}
        self._answer, self._waiting = triton.answer, dict.fromkeys(self.by_name, 0)
        triton.answer = self.answer  # type: ignore[method-assign]
        triton.settings.models = [ServedModel(name="other", model="x")]
        triton.ledger = folder / "memory.json"  # type: ignore[attr-defined]
        self.triton = triton
        self.most_committed = 0
        self.balance = MemoryBalance(triton, lambda name: self.by_name[name].state != "READY")  # type: ignore[arg-type]

    def answer(self, path: str, body: dict) -> object:
        if path.endswith("index"):
            states = [{"name": name, "state": engine.state} for name, engine in self.by_name.items()]
            return 200, json.dumps(states).encode()
        name, word = path.split("/")[3], body.get("control", "")
        engine = self.by_name.get(name)
        if not engine or not (word == "memory" or word.startswith("kv_limit:")):
            return self._answer(path, body)
        if engine.state != "READY":
            return DEAD
        if word == "memory":
            self._waiting[name] -= 1
            if engine.told and self._waiting[name] <= 0:
                engine.most = engine.told[-1] // BLOCK * BLOCK
            self.most_committed = max(self.most_committed, sum(each.most for each in self.by_name.values()))
            answer = msgspec.json.encode(msgspec.structs.asdict(engine.account)).decode()
            return 200, msgspec.json.encode({"text_output": answer})
        if engine.refuses:
            return 400, b'{"error": "the engine has not told its memory yet"}'
        engine.told.append(int(word.removeprefix("kv_limit:")))
        self._waiting[name] = engine.slow
        # What others have not confirmed to have given counts as theirs.
        committed = sum(max(each.most, *each.told[-1:], 0) for each in self.by_name.values())
        self.most_committed = max(self.most_committed, committed)
        return 200, b"{}"

    @property
    def ledger(self) -> dict[str, int]:
        file: Path = self.triton.ledger  # type: ignore[attr-defined]
        return json.loads(file.read_text()) if file.exists() else {}

    def until(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, self.by_name
            self.balance.step()
            time.sleep(0.001)

    def look(self, times: int) -> None:
        """So many times at all engines."""
        for _ in range(times):
            before = self.triton.looks  # type: ignore[attr-defined]
            self.until(lambda before=before: self.triton.looks > before)  # type: ignore[attr-defined, misc]


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    for name, value in {"LOOK_INTERVAL": 0.0, "MOVE_INTERVAL": 0.0, "POLL_INTERVAL": 0.0, "PATIENCE": 1.0}.items():
        monkeypatch.setattr(memory_balance, name, value)
    with scripted_triton() as triton:
        made = Engines(triton, tmp_path)
        triton.looks = 0  # type: ignore[attr-defined]
        look = made.balance._look

        def counted() -> object:
            yield from look()
            triton.looks += 1  # type: ignore[attr-defined]

        monkeypatch.setattr(made.balance, "_look", counted)
        yield made
        assert made.most_committed <= WHOLE


def test_memory_goes_to_where_requests_wait_and_comes_back_when_the_other_needs_its_share(
    engines: Engines, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first, other = engines.by_name.values()
    engines.look(5)
    assert not first.told
    assert not engines.ledger
    first.wanted, first.slow, other.slow = WHOLE, 2, 5
    engines.until(lambda: first.most >= WHOLE - LEAST - WHOLE // 64)
    assert other.most >= LEAST
    sizes = [WHOLE // 2, *other.told]
    assert all(before - after <= WHOLE // memory_balance.STEP for before, after in itertools.pairwise(sizes))
    assert "; requests of decoder need it" in caplog.text
    other.wanted = WHOLE
    engines.until(lambda: other.most >= WHOLE // 2 - WHOLE // 64 - BLOCK)
    engines.look(3)
    told = len(first.told)
    engines.look(5)
    assert len(first.told) == told  # each has its share: calm
    assert engines.ledger == {FIRST: first.most, OTHER: other.most}


def test_an_unloaded_one_gives_all_but_what_it_needs_to_come_back(engines: Engines) -> None:
    first, other = engines.by_name.values()
    engines.look(2)
    other.state = "UNLOADING"
    engines.look(5)
    assert not first.told
    other.most, other.state = LEAST, "UNAVAILABLE"  # that is kept for it
    engines.until(lambda: first.most == WHOLE - LEAST)
    assert engines.ledger[OTHER] == LEAST
    other.state, other.wanted, first.wanted = "READY", 5000, WHOLE // 4
    engines.until(lambda: other.most >= 5000)


def test_one_that_is_loaded_at_that_moment_keeps_what_it_may_have_read(engines: Engines) -> None:
    first, other = engines.by_name.values()
    engines.look(2)
    other.state = "LOADING"
    engines.look(5)
    assert not first.told
    other.state = "READY"
    engines.look(3)
    assert not first.told


def test_one_that_does_not_answer_keeps_what_it_has(engines: Engines) -> None:
    first, other = engines.by_name.values()
    engines.look(2)
    first.wanted, other.refuses = WHOLE, True
    engines.look(6)
    assert not first.told
    other.refuses = False
    engines.until(lambda: first.most > WHOLE // 2)


def test_what_one_did_not_take_is_lost_to_nobody(engines: Engines) -> None:
    first, other = engines.by_name.values()
    engines.look(2)
    first.wanted, first.refuses = WHOLE, True
    engines.until(lambda: other.told)
    engines.look(3)
    assert not first.told
    first.refuses = False
    engines.until(lambda: first.most >= WHOLE - LEAST - WHOLE // 64)


def test_models_of_other_devices_keep_theirs(engines: Engines) -> None:
    devices = {"first": "cuda:0", "other": "cuda:1"}
    engines.triton.settings.of = lambda name: SimpleNamespace(device=devices[name], tensor_parallel_size=1)
    alone = MemoryBalance(engines.triton, lambda name: False)  # type: ignore[arg-type]
    before = len(engines.triton.asked)
    for _ in range(20):
        alone.step()
    assert len(engines.triton.asked) == before
