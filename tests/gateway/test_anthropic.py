"""Anthropic's Messages API, as its clients send it, before a real Triton."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.anthropic import events_of, reduced, without_ids
from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from helpers.triton import RunningServer
from tidewright_gateway.auth.keys import KeyEntry, make_key
from tidewright_gateway.auth.stores import open_store

CHAT = [{"role": "user", "content": "Name three fruits."}]
OPTIONS = {"messages": CHAT, "temperature": 0, "max_tokens": 24}
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
    },
}
ONE_CALL = {"type": "any", "disable_parallel_tool_use": True}
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
VERSION = {"anthropic-version": "2023-06-01", "anthropic-beta": "anything"}


@pytest.fixture(scope="module")
def gateway(model_dir: Path, server: RunningServer) -> Iterator[RunningGateway]:
    with RunningGateway(model_dir, server) as running:
        yield running


def ask(gateway: RunningGateway, **body: Any) -> dict[str, Any]:
    answer = gateway.post("/v1/messages", {**OPTIONS, **body}, headers=VERSION)
    assert answer.status_code == 200, answer.text
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    found: dict[str, Any] = answer.json()
    return found


def streamed(gateway: RunningGateway, **body: Any) -> dict[str, Any]:
    answer = gateway.post("/v1/messages", {**OPTIONS, **body, "stream": True}, headers=VERSION)
    assert answer.headers["content-type"].startswith("text/event-stream")
    return reduced(events_of(answer.text))


def num_prompt_tokens(message: dict[str, Any]) -> int:
    """Those in the prefix cache are counted apart."""
    return message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"system": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}], "max_tokens": 3},
        {"tools": [WEATHER], "tool_choice": ONE_CALL, "messages": [QUESTION], "max_tokens": 100},
    ],
)
def test_the_events_build_the_whole_answer(gateway: RunningGateway, more: dict[str, Any]) -> None:
    found, whole = (without_ids(one) for one in (streamed(gateway, **more), ask(gateway, **more)))
    assert num_prompt_tokens(found) == num_prompt_tokens(whole)
    usages = (found.pop("usage"), whole.pop("usage"))
    assert usages[0]["output_tokens"] == usages[1]["output_tokens"]
    assert found == whole


def test_it_is_the_answer_of_chat_completions(gateway: RunningGateway) -> None:
    found = ask(gateway, system="Be short.")
    chat = [{"role": "system", "content": "Be short."}, *CHAT]
    body = {**OPTIONS, "messages": chat}
    same = gateway.post("/v1/chat/completions", body).json()
    assert found["content"] == [{"type": "text", "text": same["choices"][0]["message"]["content"]}]
    assert found["usage"]["output_tokens"] == same["usage"]["completion_tokens"]
    assert num_prompt_tokens(found) == same["usage"]["prompt_tokens"]
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", MODEL)
    assert found["id"].startswith("msg_")


def test_tools_are_called_and_their_results_are_read(gateway: RunningGateway) -> None:
    body = {"tools": [WEATHER], "messages": [QUESTION], "max_tokens": 100}
    asked = ask(gateway, **body, tool_choice=ONE_CALL)
    (call,) = asked["content"]
    assert asked["stop_reason"] == "tool_use"
    assert (call["type"], call["name"], call["input"].keys()) == ("tool_use", "get_weather", {"city", "unit"})
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "18 degrees"}]}
    body["messages"] = [QUESTION, {"role": "assistant", "content": asked["content"]}]
    body["messages"] += [{"role": "user", "content": [result, {"type": "text", "text": "Say it in words."}]}]
    answer = ask(gateway, **body)
    assert "18 degrees" in answer["content"][0]["text"]
    assert answer["stop_reason"] == "end_turn"
    counted = gateway.post("/v1/messages/count_tokens", {"messages": body["messages"], "tools": [WEATHER]})
    assert counted.json() == {"input_tokens": num_prompt_tokens(answer)}
    none = ask(gateway, **{**body, "max_tokens": 4, "tool_choice": {"type": "none"}})
    assert num_prompt_tokens(none) < num_prompt_tokens(answer)


def test_an_answer_ends_at_its_limits_and_continues_what_it_is_given(gateway: RunningGateway) -> None:
    whole = ask(gateway)["content"][0]["text"]
    assert ask(gateway, max_tokens=2)["stop_reason"] == "max_tokens"
    end = whole.split()[2]
    stopped = ask(gateway, stop_sequences=[end])
    assert stopped["content"][0]["text"] == whole.partition(end)[0]
    begun = whole.partition(end)[0].rstrip()
    continued = ask(gateway, messages=[*CHAT, {"role": "assistant", "content": begun}])
    assert begun + continued["content"][0]["text"] == whole


def test_a_json_schema_is_followed(gateway: RunningGateway) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    text = ask(gateway, output_config={"format": {"type": "json_schema", "schema": schema}})["content"][0]["text"]
    assert text.startswith('{"n"')


def test_models_are_listed_as_its_clients_read_them(echo_gateway: RunningGateway) -> None:
    found = echo_gateway.http.get("/v1/models", headers=VERSION).json()
    (model,) = found["data"]
    assert (model["type"], model["id"], model["display_name"]) == ("model", MODEL, MODEL)
    assert (found["first_id"], found["last_id"], found["has_more"]) == (MODEL, MODEL, False)
    assert echo_gateway.http.get(f"/v1/models/{MODEL}", headers=VERSION).json() == model
    assert echo_gateway.http.get("/v1/models").json()["object"] == "list"


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/messages", {}, 400, "invalid_request_error"),
        ("/v1/messages", {**OPTIONS, "model": "other"}, 404, "not_found_error"),
        ("/v1/messages", {**OPTIONS, "stream": True, "stop_sequences": [""]}, 400, "invalid_request_error"),
        ("/v1/messages", {"messages": "a" * 2**25}, 413, "request_too_large"),
        ("/v1/messages/count_tokens", {"messages": CHAT, "max_tokens": 1}, 400, "invalid_request_error"),
        ("/v1/messages/batches", {}, 404, "not_found_error"),
    ],
)
def test_errors_have_its_form_on_its_paths(
    echo_gateway: RunningGateway, path: str, body: dict[str, Any], status: int, kind: str
) -> None:
    answer = echo_gateway.post(path, body)
    found = answer.json()
    assert (answer.status_code, found["type"], found["error"]["type"]) == (status, "error", kind)
    assert found["error"]["message"]
    assert found["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]


def test_errors_have_its_form_for_its_clients_alone(echo_gateway: RunningGateway) -> None:
    assert echo_gateway.http.get("/v1/models/other", headers=VERSION).json()["type"] == "error"
    other = echo_gateway.http.get("/v1/models/other")
    assert other.json()["error"]["code"] == "model_not_found"
    assert "request-id" not in other.headers


def test_a_key_may_come_as_x_api_key(model_dir: Path, echo: EchoReplica, tmp_path: Path) -> None:
    key, hashed = make_key("alice")
    open_store(str(tmp_path / "keys.yaml")).change("alice", lambda _: KeyEntry("alice", (hashed,)))
    with RunningGateway(model_dir, echo, keys=tmp_path / "keys.yaml") as gateway:
        answers: list[httpx.Response] = []
        for headers in ({"x-api-key": key}, {"Authorization": f"Bearer {key}"}, {"x-api-key": "none"}, {}):
            answers.append(gateway.post("/v1/messages", {**OPTIONS, "max_tokens": 2}, headers=headers))
    assert [answer.status_code for answer in answers] == [200, 200, 401, 401]
    assert answers[0].json()["content"] == [{"type": "text", "text": " word word"}]
    assert answers[2].json()["error"]["type"] == "authentication_error"
