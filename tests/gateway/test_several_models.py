"""A gateway of several models: which decoder of the replicas a name means, and that each is on its own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from helpers.scripted_replicas import samples
from tidewright.schema import AdapterStatus
from tidewright_gateway.anthropic.models import model_list
from tidewright_gateway.metrics import Metrics

VERSION = {"anthropic-version": "2023-06-01"}
DECODERS = {MODEL: "decoder", "small": "decoder_small"}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
}


@pytest.fixture(scope="module")
def echo() -> Iterator[EchoReplica]:
    with EchoReplica(limit=4) as replica:
        yield replica


@pytest.fixture(scope="module")
def gateway(model_dir: Path, echo: EchoReplica) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, echo, models=f"small={model_dir}", wait_for_replica=0.1) as running:
        yield running


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("path", PATHS)
def test_a_name_means_its_decoder(gateway: RunningGateway, echo: EchoReplica, path: str, name: str) -> None:
    echo.asked.clear()
    answer = gateway.post(path, {**PATHS[path], "model": name})
    assert (answer.status_code, answer.json()["model"]) == (200, name)
    assert echo.asked == [DECODERS[name]]


def test_a_stream_says_who_serves_as_it_does_with_one_model(gateway: RunningGateway) -> None:
    body = {**PATHS["/v1/chat/completions"], "model": "small", "stream": True}
    events = gateway.post("/v1/chat/completions", body).text.split("\n\n")
    told = [json.loads(event.removeprefix("data: ")) for event in events if event and "[DONE]" not in event]
    assert {one["served_by"] for one in told} == {"decoder"}


def test_both_are_listed_and_no_other_is_found(gateway: RunningGateway) -> None:
    assert [one["id"] for one in gateway.http.get("/v1/models").json()["data"]] == list(DECODERS)
    assert gateway.http.get("/v1/models/small").json()["id"] == "small"
    answer = gateway.post("/v1/completions", {"prompt": "Hi", "model": "nobody"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert all(repr(name) in answer.json()["error"]["message"] for name in DECODERS)
    page = gateway.http.get("/v1/models?limit=1", headers=VERSION).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([MODEL], True)


def test_pages_of_models_go_on_behind_the_last_or_before_the_first() -> None:
    infos = [{"id": name} for name in "abcd"]

    def page(*bounds: Any) -> tuple[str, bool]:
        made = model_list(infos, *bounds)
        return "".join(one["id"] for one in made["data"]), made["has_more"]

    assert page(2, None, None) == ("ab", True)
    assert page(2, "b", None) == ("cd", False)
    assert page(2, None, "d") == ("bc", True)
    assert page(2, "d", None) == page(2, None, "a") == page(2, "nobody", None) == ("", False)


def wait_until_away(gateway: RunningGateway, names: list[str]) -> None:
    """Status checks come several times a second."""
    deadline = time.monotonic() + 20
    while gateway.http.get("/health/ready").json().get("models_in_trouble", []) != names:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("away", DECODERS)
def test_one_that_is_not_loaded_is_missed_by_its_own_requests_only(
    gateway: RunningGateway, echo: EchoReplica, away: str
) -> None:
    (there,) = set(DECODERS) - {away}
    echo.away = {DECODERS[away]}
    try:
        wait_until_away(gateway, [away])
        answers = {name: gateway.post("/v1/completions", {"prompt": "Hi", "model": name}) for name in DECODERS}
        assert (answers[there].status_code, answers[away].status_code) == (200, 503)
        status = gateway.http.get("/admin/status").json()
        seen = {MODEL: status["replicas"], "small": status["models"]["small"]["replicas"]}
        assert (seen[there][0]["trouble"], seen[away][0]["takes_requests"]) == ("", False)
        assert f"its model {DECODERS[away]} is not loaded" in seen[away][0]["trouble"]
        assert (gateway.metric("replicas_usable"), gateway.metric("replica_up")) == (1, 1)
    finally:
        echo.away = set()
        wait_until_away(gateway, [])


def test_a_model_is_unloaded_and_loaded_on_all_replicas(gateway: RunningGateway, echo: EchoReplica) -> None:
    def tell(what: str, name: str) -> tuple[int, dict[str, Any]]:
        answer = gateway.http.post(f"/admin/models/{what}", json={"model": name})
        return answer.status_code, answer.json()

    chain = ["tokenizer_small", "decoder_small", "generate_small"]
    echo.commands.clear()
    assert tell("unload", "small") == (200, {"unloaded": "small"})
    assert gateway.http.get("/health/ready").json()["models_in_trouble"] == ["small"]
    assert gateway.post("/v1/completions", {"prompt": "Hi"}).status_code == 200
    echo.refusals["decoder_small"] = "no memory"
    status, body = tell("load", "small")
    assert (status, body["error"]["code"]) == (503, "model_not_changed")
    assert "0 of 1 replicas have loaded it; " in body["error"]["message"]
    assert "no memory" in body["error"]["message"]
    echo.refusals.clear()
    assert tell("load", "small") == (200, {"loaded": "small"})
    wait_until_away(gateway, [])
    assert [word for word in echo.commands if "lora" not in word] == [
        *(f"unload {one}" for one in reversed(chain)),
        *(f"load {one}" for one in chain[:2]),
        *(f"load {one}" for one in chain),
    ]
    assert tell("unload", MODEL) == (200, {"unloaded": MODEL})
    assert tell("load", MODEL) == (200, {"loaded": MODEL})
    assert echo.commands[-2:] == ["unload decoder", "load decoder"]
    assert tell("load", "nobody")[0] == 400
    wait_until_away(gateway, [])


def test_a_lora_adapter_is_of_one_model(gateway: RunningGateway, echo: EchoReplica) -> None:
    echo.status = msgspec.structs.replace(echo.status, adapters=[])
    echo.statuses["decoder_small"] = echo.status

    def tell(command: str, **body: str) -> tuple[int, str]:
        answer = gateway.http.post(f"/v1/{command}_lora_adapter", json=body)
        return answer.status_code, answer.text

    def load(name: str, **body: str) -> tuple[int, str]:
        return tell("load", lora_name=name, lora_path="sql-v2", **body)

    assert load("sql", base_model_name="small")[0] == 200
    echo.asked.clear()
    assert gateway.post("/v1/completions", {"prompt": "Hi", "model": "sql"}).json()["model"] == "sql"
    assert echo.asked == ["decoder_small"]
    listed = {one["id"]: one["parent"] for one in gateway.http.get("/v1/models").json()["data"]}
    assert listed == {MODEL: None, "small": None, "sql": "small"}
    for name, base, message in (
        ("sql", MODEL, "the model small has a LoRA adapter 'sql'"),
        ("small", MODEL, "'small' is a model itself"),
        ("new", "nobody", f"no model 'nobody'; the models are {MODEL}, small"),
    ):
        status, text = load(name, base_model_name=base)
        assert (status, message in text) == (400, True)
    assert tell("unload", lora_name="sql")[0] == 200
    assert gateway.post("/v1/completions", {"prompt": "Hi", "model": "sql"}).status_code == 404
    assert (echo.commands[-2:], echo.status.adapters) == (["load_lora sql", "unload_lora sql"], [])


def test_an_adapter_that_a_replica_has_by_a_model_s_name_is_not_listed(
    gateway: RunningGateway, echo: EchoReplica
) -> None:
    loaded = [AdapterStatus(name, "/adapters/sql-v2", True) for name in (MODEL, "small", "tax")]
    echo.statuses["decoder_small"] = msgspec.structs.replace(echo.status, adapters=loaded)
    deadline = time.monotonic() + 30
    while "tax" not in (ids := [one["id"] for one in gateway.http.get("/v1/models").json()["data"]]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ids == [MODEL, "small", "tax"]


def test_the_level_shown_is_that_of_the_model_that_is_worst_off() -> None:
    metrics = Metrics()
    for level, model in ((2, ""), (1, "small"), (0, "")):
        metrics.degraded(level, {"queue": level > 0}, model)
    found = samples(metrics)
    assert (found["degradation_level",], found["degradation_reason", "queue"]) == (1, 1)
