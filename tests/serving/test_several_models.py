"""Two models in one real server: each answers as transformers does, and what happens to one disturbs no other."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import tokenizers
from click.testing import CliRunner

from helpers.checkpoints import expected, save
from helpers.exports import save_tokenizer
from helpers.families import FAMILIES
from helpers.gateway import RunningGateway
from helpers.processes import child
from helpers.triton import RunningServer
from tidewright.cache import MANIFEST
from tidewright.launch import memory_balance, memory_command
from tidewright.launch.cli import main
from tidewright.launch.memory_balance import MemoryBalance

PROMPT, COUNT = [5, 6, 7], 8
NAMES = {"one": "decoder", "two": "decoder_two"}
TIMEOUT = 60.0  # seconds


@dataclass
class Served:
    folder: Path
    ids: list[int]
    """That transformers generates."""
    text: str


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    made = {}
    for name, family in (("one", "llama, tied"), ("two", "qwen 3")):
        folder = tmp_path_factory.mktemp("models") / name
        model = save(folder, FAMILIES[family])
        save_tokenizer(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
        (folder / MANIFEST).write_text("{}")
        ids = expected(model, PROMPT, COUNT)
        decode = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode
        made[name] = Served(folder, ids, decode([*PROMPT, *ids]).removeprefix(decode(PROMPT)))
    return made


@pytest.fixture(scope="module")
def server(models: dict[str, Served]) -> Iterator[RunningServer]:
    two = {"name": "two", "model": str(models["two"].folder), "max_running": 3}
    options = {"dtype": "float32", "kv_cache_memory": "4MiB", "kv_cache_share": 0.25, "models": [two]}
    with RunningServer(models["one"].folder, **options) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(models: dict[str, Served], server: RunningServer) -> Iterator[RunningGateway]:
    options = {"served_model_name": "one", "models": f"two={models['two'].folder}", "wait_for_replica": 0.1}
    with RunningGateway(models["one"].folder, server, **options) as running:
        yield running


def complete(gateway: RunningGateway, name: str) -> httpx.Response:
    body = {"model": name, "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    return gateway.http.post("/v1/completions", json=body)


def text_of(answer: httpx.Response) -> str:
    """Empty for an error."""
    return str(answer.json()["choices"][0]["text"]) if answer.status_code == 200 else ""


class Load:
    """Requests to one model, one after the other, until it is left."""

    def __init__(self, gateway: RunningGateway, name: str) -> None:
        self._gateway, self._name = gateway, name
        self.answers: list[httpx.Response] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(2)]

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.answers.append(complete(self._gateway, self._name))

    def more(self) -> None:
        """Until some more have been answered."""
        count = len(self.answers) + 5
        until(lambda: len(self.answers) >= count)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.more()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run(*words: str) -> str:
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", NAMES)
def test_each_answers_as_transformers_does(
    models: dict[str, Served], server: RunningServer, gateway: RunningGateway, name: str
) -> None:
    assert text_of(complete(gateway, name)) == models[name].text
    sampling = {"temperature": 0, "max_tokens": COUNT, "ignore_eos": True}
    assert server.generate(NAMES[name], input_ids=PROMPT, sampling_parameters=sampling).token_ids == models[name].ids


def test_one_budget_is_divided_and_each_engine_has_its_own_series(server: RunningServer) -> None:
    url = server.triton.metrics_url
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(url, trust_env=False).text.splitlines() if line[0] != "#")
    one, two = float(lines["tidewright_kv_blocks"]), float(lines['tidewright_kv_blocks{model="two"}'])
    # 3 layers, 2 KV heads, keys and values of 16 tokens in float32; the heads have 8 numbers and 12.
    for blocks, size, share in ((one, 3 * 2 * 2 * 16 * 8 * 4, 2**20), (two, 3 * 2 * 2 * 16 * 12 * 4, 3 * 2**20)):
        assert blocks == share // size
    assert lines['tidewright_batch_places{model="two"}'] == "3"


@dataclass
class Memory:
    """`serve` moves it while this is stepped."""

    server: RunningServer
    unloaded: list[str]
    """Decoders."""

    def __post_init__(self) -> None:
        self._balance = MemoryBalance(self.server.triton, self.unloaded.__contains__)

    def account(self, name: str) -> dict[str, int]:
        return memory_command.ask(self.server.triton.http_url, NAMES[name])

    def until(self, what: Callable[[], object]) -> None:
        def stepped() -> object:
            self._balance.step()
            return what()

        until(stepped)


@pytest.fixture
def memory(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Memory:
    for name, value in {"LOOK_INTERVAL": 0.05, "MOVE_INTERVAL": 0.0, "POLL_INTERVAL": 0.02}.items():
        monkeypatch.setattr(memory_balance, name, value)
    return Memory(server, [])


def test_memory_goes_to_the_model_whose_requests_wait_for_it(server: RunningServer, memory: Memory) -> None:
    """No request fails for it, and outputs stay the same."""
    prompts = [random.Random(number).choices(range(3, 100), k=150) for number in range(60)]
    greedy = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}

    def generate() -> list[list[int]]:
        with server.stream() as stream:
            for number, prompt in enumerate(prompts):
                stream.send(str(number), input_ids=prompt, sampling_parameters=greedy)
            done = stream.finish()
        assert not any(each.error for each in done.values())
        return [done[str(number)].token_ids for number in range(len(prompts))]

    expected_ids, moved = generate(), threading.Event()
    before = memory.account("one")["kv_most"], memory.account("two")["kv_most"]

    def keep_busy() -> list[list[list[int]]]:
        """14 blocks each, of the 170 that the first has."""
        rounds = []
        while not moved.is_set():
            rounds.append(generate())
        return rounds

    with ThreadPoolExecutor() as pool:
        busy = pool.submit(keep_busy)
        try:
            memory.until(lambda: memory.account("one")["kv_target"] > before[0])
        finally:
            moved.set()
        assert all(ids == expected_ids for ids in busy.result())
    assert memory.account("one")["kv_most"] + memory.account("two")["kv_most"] <= sum(before)


def test_one_is_unloaded_and_loaded_under_load_of_the_other(
    models: dict[str, Served], server: RunningServer, gateway: RunningGateway, memory: Memory
) -> None:
    whole, least = sum(memory.account(name)["kv_most"] for name in NAMES), memory.account("two")["kv_least"]
    memory.until(lambda: memory._balance._whole == whole)  # it knows both
    with Load(gateway, "one") as load:
        url = server.triton.http_url
        assert run("model", "unload", "two", "--url", gateway.url) == "Unloaded two.\n"
        until(lambda: complete(gateway, "two").status_code == 503)
        until(lambda: run("model", "list", "--url", url) == "decoder  loaded\ntwo      not loaded\n")
        until(lambda: run("model", "list", "--url", gateway.url) == "one  served\ntwo  no replica can serve it\n")
        load.more()
        memory.unloaded.append("decoder_two")
        memory.until(lambda: memory.account("one")["kv_most"] > whole - least - 10_000)  # less than two blocks are lost
        assert run("model", "load", "two", "--url", gateway.url) == "Loaded two.\n"
        until(lambda: complete(gateway, "two").status_code == 200)
        assert memory.account("two")["kv_most"] == least  # the rest when it needs it
        load.more()
    assert {text_of(answer) for answer in load.answers} == {models["one"].text}


def test_the_engine_of_one_is_killed_and_the_other_does_not_notice(
    models: dict[str, Served], server: RunningServer, gateway: RunningGateway
) -> None:
    assert server.triton.pid is not None
    with Load(gateway, "one") as load:
        stub = child(server.triton.pid, "/decoder_two/")
        child(stub.pid, "tidewright.engine").kill()
        load.more()
        until(lambda: complete(gateway, "two").status_code == 200)
        load.more()
    assert {text_of(answer) for answer in load.answers} == {models["one"].text}


def test_the_first_is_unloaded_and_the_server_is_healthy_for_the_other(
    models: dict[str, Served], server: RunningServer, gateway: RunningGateway
) -> None:
    """The last test here: to load it again would take seconds."""
    url = server.triton.http_url
    with Load(gateway, "two") as load:
        run("model", "unload", "decoder", "--url", url)
        until(lambda: complete(gateway, "one").status_code == 503)
        assert "the first model takes no requests: decoder was unloaded by request" in run("health", "--url", url)
        assert run("health", "--live", "--url", url) == "alive\n"
        until(lambda: gateway.http.get("/health/ready").json().get("models_in_trouble") == ["one"])
        load.more()
    assert {text_of(answer) for answer in load.answers} == {models["two"].text}
