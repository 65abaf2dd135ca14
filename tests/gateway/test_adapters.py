"""LoRA adapters over a gateway: loaded on all replicas, called by name, and what is said where that can't be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from click.testing import CliRunner

from helpers.api_keys import add
from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from tidewright.launch.cli import main
from tidewright.schema import AdapterStatus
from tidewright_gateway.auth.callers import Role
from tidewright_gateway.auth.stores import FileStore

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
OPTIONS = {"generation_probe_interval": 0, "routing": "round_robin", "wait_for_replica": 0.2}


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def serving(*adapters: AdapterStatus) -> EchoReplica:
    replica = EchoReplica()
    replica.status = msgspec.structs.replace(replica.status, adapters=list(adapters))
    return replica


@dataclass(frozen=True)
class Pair:
    gateway: RunningGateway
    """Its client has the key of an admin."""
    one: EchoReplica
    other: EchoReplica
    keys: Path
    admin: str
    user: str

    def second(self, model_dir: Path) -> RunningGateway:
        """Another gateway of the same replicas."""
        made = RunningGateway(model_dir, self.one, self.other, keys=self.keys, **OPTIONS)
        made.http.headers["Authorization"] = f"Bearer {self.admin}"
        return made


@pytest.fixture(scope="module")
def pair(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    store = FileStore(keys)
    admin, user = add(store, "a", role=Role.ADMIN), add(store, "u")
    with serving() as one, serving() as other, RunningGateway(model_dir, one, other, keys=keys, **OPTIONS) as gateway:
        gateway.http.headers["Authorization"] = f"Bearer {admin}"
        yield Pair(gateway, one, other, keys, admin, user)


def load(gateway: RunningGateway, name: Any, path: Any = "folder", **more: Any) -> httpx.Response:
    return gateway.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})


def unload(gateway: RunningGateway, name: str, **more: Any) -> httpx.Response:
    return gateway.http.post("/v1/unload_lora_adapter", json={"lora_name": name, **more})


def names(gateway: RunningGateway) -> list[str]:
    return [model["id"] for model in gateway.http.get("/v1/models").json()["data"]]


def test_an_adapter_is_loaded_everywhere_called_by_name_in_each_api_and_unloaded(pair: Pair) -> None:
    gateway, one, other = pair.gateway, pair.one, pair.other
    answer = load(gateway, "sql", "/adapters/sql-v2", lora_int_id=7, load_inplace=False)  # as vLLM's clients send it
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert one.commands == other.commands == ["load_lora sql"]
    base, card = gateway.http.get("/v1/models").json()["data"]
    assert (base["id"], base["root"], base["parent"]) == (MODEL, MODEL, None)
    assert (card["id"], card["root"], card["parent"]) == ("sql", "sql-v2", MODEL)
    assert gateway.http.get("/v1/models/sql").json() == card
    anthropic = {"anthropic-version": "2023-06-01"}
    first = gateway.http.get("/v1/models?limit=1", headers=anthropic).json()
    assert ([info["id"] for info in first["data"]], first["has_more"]) == ([MODEL], True)
    rest = gateway.http.get(f"/v1/models?after_id={MODEL}", headers=anthropic).json()
    assert ([info["id"] for info in rest["data"]], rest["has_more"]) == (["sql"], False)

    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 2}),
        ("/v1/messages", CHAT),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
    ):
        asked = len(one.requests), len(other.requests)
        told = gateway.post(path, {**body, "model": "sql"})
        assert (told.status_code, told.json()["model"]) == (200, "sql"), told.text
        news = one.requests[asked[0] :] + other.requests[asked[1] :]
        assert [sampling.lora_name for _, sampling in news] == ["sql"]
    assert gateway.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2}).json()["model"] == MODEL
    assert {sampling.lora_name for _, sampling in one.requests + other.requests} == {"sql", None}
    assert gateway.metric("adapter_requests_total", adapter="sql") == 4

    told = load(gateway, "sql")
    assert (told.status_code, told.json()["error"]["code"]) == (400, "adapter_exists")
    answer = unload(gateway, "sql", lora_int_id=7)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert (one.commands[1:], other.commands[1:]) == (["unload_lora sql"],) * 2
    assert names(gateway) == [MODEL]
    told = gateway.post("/v1/chat/completions", {**CHAT, "model": "sql"})
    assert (told.status_code, told.json()["error"]["code"]) == (404, "model_not_found")
    told = unload(gateway, "sql")
    assert (told.status_code, told.json()["error"]["code"]) == (404, "adapter_not_found")


def test_what_can_not_be_loaded_is_refused_with_the_replica_s_reason(pair: Pair) -> None:
    gateway, one, other = pair.gateway, pair.one, pair.other
    one.refusals["bad"] = other.refusals["bad"] = "its rank is 512"
    told = load(gateway, "bad")
    assert (told.status_code, told.json()["error"]["code"]) == (400, "adapter_refused")
    assert f"{one.grpc_url}: its rank is 512" in told.json()["error"]["message"]
    assert names(gateway) == [MODEL]
    for body in (
        {},
        {"lora_name": "a"},
        {"lora_name": "a b", "lora_path": "p"},
        {"lora_name": "x" * 129, "lora_path": "p"},
        {"lora_name": "a", "lora_path": "p" * 4097},
        {"lora_name": "a", "lora_path": "p", "load_inplace": True},
        {"lora_name": MODEL, "lora_path": "p"},
    ):
        assert gateway.http.post("/v1/load_lora_adapter", json=body).status_code == 400, body
    assert "load_lora a" not in one.commands
    told = load(gateway, "a", load_inplace=True).json()["error"]
    assert "load_inplace: an adapter is not replaced while requests use it" in told["message"]
    assert told["param"] == "load_inplace"
    told = gateway.post("/v1/completions", {"prompt": "Hi", "lora_name": "sql"})
    assert "name the adapter in model" in told.json()["error"]["message"]


def test_the_command_line(pair: Pair) -> None:
    gateway, one = pair.gateway, pair.one

    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["lora", *words, "--url", gateway.url], env={"TIDEWRIGHT_KEY": pair.admin})
        return result.exit_code, result.output

    assert run("list") == (0, "no adapter is loaded\n")
    assert run("load", "law", "some/law-v1") == (0, "Loaded law.\n")
    assert run("list") == run("list", "--model", MODEL) == (0, f"law  law-v1, of {MODEL}\n")
    assert run("list", "--model", "another") == (0, "no adapter is loaded\n")
    assert "there is no model 'another'" in run("load", "tax", "p", "--model", "another")[1]
    assert run("load", "law", "p")[0] == 1
    assert "loaded already" in run("load", "law", "p")[1]
    assert run("unload", "law") == (0, "Unloaded law.\n")
    assert "there is no LoRA adapter" in run("unload", "law")[1]
    assert one.commands[-2:] == ["load_lora law", "unload_lora law"]


def test_where_only_some_replicas_load_it_these_serve_it_and_the_others_are_told_again(pair: Pair) -> None:
    gateway, one, other = pair.gateway, pair.one, pair.other
    other.refusals["half"] = "no such folder"
    told = load(gateway, "half")
    assert (told.status_code, told.json()["error"]["code"]) == (409, "adapter_partly")
    message = told.json()["error"]["message"]
    assert f"loaded at {one.grpc_url}; not at {other.grpc_url}: no such folder" in message
    before = len(other.requests)
    for _ in range(4):
        assert gateway.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "model": "half"}).status_code == 200
    assert len(other.requests) == before  # in turn, but only where it is
    status = {one["address"]: one for one in gateway.http.get("/admin/status").json()["replicas"]}
    assert (status[one.grpc_url]["adapters"], status[other.grpc_url]["adapters"]) == (["half"], [])
    assert "no such folder" in status[other.grpc_url]["adapter_troubles"]["half"]
    assert unload(gateway, "half").status_code == 200


def test_a_replica_that_comes_later_and_a_second_gateway_follow(model_dir: Path, pair: Pair) -> None:
    gateway, one, other = pair.gateway, pair.one, pair.other
    other.status = msgspec.structs.replace(other.status, adapters=[AdapterStatus("own", "o", True)])
    until(lambda: sorted(names(gateway)) == ["own", MODEL])  # of one replica's configuration, and only there
    with pair.second(model_dir) as second:
        assert load(gateway, "tax").status_code == 200
        told = second.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "model": "tax"})
        assert told.status_code == 200  # at once: it asks before it says that there is none
        other.status = msgspec.structs.replace(other.status, adapters=[])  # as after a restart
        until(lambda: other.commands.count("load_lora tax") >= 2)
        assert unload(second, "tax").status_code == 200
        other.status = msgspec.structs.replace(other.status, adapters=[AdapterStatus("tax", "folder", True, 1.0)])
        until(lambda: other.commands.count("unload_lora tax") == 2)  # away meanwhile, it still had it
        until(lambda: names(gateway) == [MODEL])
        assert "load_lora own" not in one.commands


def test_only_admins_load_and_unload(pair: Pair) -> None:
    for path in ("/v1/load_lora_adapter", "/v1//load_lora_adapter", "/v1/unload_lora_adapter"):
        body = {"lora_name": "none", **({} if "unload" in path else {"lora_path": "p"})}
        for key, status in (("wrong", 401), (pair.user, 403)):
            answer = pair.gateway.http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == status, (path, key)
    assert "load_lora none" not in pair.one.commands
    answer = pair.gateway.http.get("/v1/models", headers={"Authorization": f"Bearer {pair.user}"})
    assert answer.status_code == 200


def test_replicas_that_serve_none_say_how_to_change_that(pair: Pair) -> None:
    before = pair.one.status, pair.other.status
    pair.one.status, pair.other.status = (msgspec.structs.replace(status, adapters=None) for status in before)
    told = load(pair.gateway, "none")
    pair.one.status, pair.other.status = before
    assert (told.status_code, told.json()["error"]["code"]) == (400, "adapters_off")
    assert "--adapter-folder" in told.json()["error"]["message"]


def test_a_command_counts_though_another_gateway_s_clock_is_ahead(pair: Pair) -> None:
    """The replicas tell of a load, and then of an unload, that were given in the future."""
    gateway, replicas = pair.gateway, (pair.one, pair.other)

    def told(loaded: bool, at: float) -> None:
        for replica in replicas:
            status = AdapterStatus("ahead", "/adapters/ahead", loaded, at)
            replica.status = msgspec.structs.replace(replica.status, adapters=[status])

    ahead = time.time() + 600
    told(True, ahead)
    until(lambda: "ahead" in names(gateway))
    assert unload(gateway, "ahead").status_code == 200
    assert "ahead" not in names(gateway)
    told(False, ahead + 600)
    until(lambda: load(gateway, "ahead").status_code == 200)
    assert "ahead" in names(gateway)
    assert unload(gateway, "ahead").status_code == 200
