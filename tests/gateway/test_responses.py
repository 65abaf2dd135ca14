"""Responses as clients see them: who may have them, how long, and how running ones end; before an echoing replica."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from helpers.redis import RunningRedis
from helpers.responses import events_in
from tidewright_gateway.auth.callers import Limits
from tidewright_gateway.auth.keys import KeyEntry, make_key
from tidewright_gateway.auth.stores import open_store

KEYS = {"a": Limits(), "b": Limits(), "one": Limits(concurrent=1), "few": Limits(requests_per_second=0.01)}
LONG = 4000  # tokens


class Clients:
    """A client for each key."""

    def __init__(self, gateway: RunningGateway, replica: EchoReplica, keys: dict[str, str]) -> None:
        self.gateway, self.replica, self.keys = gateway, replica, keys

    def __getitem__(self, name: str) -> openai.OpenAI:
        return self.gateway.openai.with_options(api_key=self.keys[name])

    def headers(self, name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[name]}"}


@pytest.fixture(scope="module")
def clients(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    folder = tmp_path_factory.mktemp("gateway")
    store, keys = open_store(str(folder / "keys.yaml")), {}
    for name, limits in KEYS.items():
        keys[name], hashed = make_key(name)
        entry = KeyEntry(name, (hashed,), limits=limits)
        store.change(name, lambda _, entry=entry: entry)
    with EchoReplica() as replica, RunningGateway(model_dir, replica, keys=folder / "keys.yaml") as gateway:
        yield Clients(gateway, replica, keys)


def ask(client: openai.OpenAI, text: str = "Hi", max_output_tokens: int = 3, **fields: Any) -> Any:
    return client.responses.create(model=MODEL, input=text, max_output_tokens=max_output_tokens, **fields)


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(client: openai.OpenAI, id: str) -> bool:
    try:
        client.responses.retrieve(id)
    except openai.NotFoundError:
        return True
    return False


def test_a_response_is_retrieved_listed_continued_and_deleted_by_its_key_only(clients: Clients) -> None:
    mine, theirs = clients["a"], clients["b"]
    first = ask(mine, "One", metadata={"a": "b"})
    assert mine.responses.retrieve(first.id) == first
    before = clients.replica.requests[-1][0]
    second = ask(mine, "Two", previous_response_id=first.id)
    assert clients.replica.requests[-1][0] > before  # tokens of the prompt
    assert second.previous_response_id == first.id
    items = mine.responses.input_items.list(second.id, order="asc").data
    assert [(item.role, item.content[0].text) for item in items] == [
        ("user", "One"),
        ("assistant", first.output_text),
        ("user", "Two"),
    ]

    unknown = f"resp_{'0' * 48}"
    told = set()
    for client, id in ((theirs, first.id), (mine, unknown)):
        for ask_for in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError) as refused:
                ask_for(id)
            told.add(str(refused.value).replace(id, "ID"))
        with pytest.raises(openai.NotFoundError):
            client.responses.input_items.list(id)
        with pytest.raises(openai.BadRequestError) as unknown_id:
            ask(client, previous_response_id=id)
        assert unknown_id.value.code == "previous_response_not_found"
        told.add(str(unknown_id.value).replace(id, "ID"))
    assert len(told) == 2  # the same for an id of another key and for an unknown one

    mine.responses.delete(first.id)
    assert is_gone(mine, first.id)
    third = ask(mine, "Three", previous_response_id=second.id)  # has the items of the first
    assert len(mine.responses.input_items.list(third.id).data) == 5


def test_an_item_of_a_stored_response_may_be_referred_to_by_its_key_only(clients: Clients) -> None:
    mine, theirs = clients["a"], clients["b"]
    first = ask(mine, "One")
    (item,) = first.output
    again = [{"role": "user", "content": "One"}, {"type": "item_reference", "id": item.id}]
    whole = [again[0], {"role": "assistant", "content": first.output_text}]
    asked = []
    for items in (again, [again[0], {"id": item.id}], whole):
        made = mine.responses.create(model=MODEL, input=items, max_output_tokens=1)
        asked.append(clients.replica.requests[-1][0])  # tokens of the prompt
        listed = mine.responses.input_items.list(made.id, order="asc").data
        assert [entry.content[0].text for entry in listed] == ["One", first.output_text]
    assert len(set(asked)) == 1
    for client, id in ((theirs, item.id), (mine, item.id[:-1] + "7"), (mine, f"msg_{'0' * 52}"), (mine, "msg_1")):
        with pytest.raises(openai.BadRequestError, match="no stored response with the item") as refused:
            client.responses.create(model=MODEL, input=[{"type": "item_reference", "id": id}])
        assert refused.value.param == "input.0.id"


def test_input_items_come_in_pages(clients: Clients) -> None:
    client = clients["a"]
    items = [{"role": "user", "content": str(number)} for number in range(5)]
    made = client.responses.create(model=MODEL, input=items, max_output_tokens=1)
    page = client.responses.input_items.list(made.id, limit=2)
    assert [item.content[0].text for item in page.data] == ["4", "3"]
    assert page.has_more
    assert [item.content[0].text for item in page] == ["4", "3", "2", "1", "0"]  # all pages
    rising = client.responses.input_items.list(made.id, limit=2, order="asc", after=page.data[0].id)
    assert (rising.data, rising.has_more) == ([], False)
    with pytest.raises(openai.BadRequestError, match="after"):
        client.responses.input_items.list(made.id, after="msg_other")


def test_nothing_is_stored_if_the_request_says_so(clients: Clients) -> None:
    client = clients["a"]
    kept, dropped = ask(client), ask(client, store=False)
    assert (kept.to_dict()["store"], dropped.to_dict()["store"]) == (True, False)
    assert is_gone(client, dropped.id)
    assert not is_gone(client, kept.id)


def test_a_stream_is_stored_before_its_end_is_sent(clients: Clients) -> None:
    client = clients["a"]
    *_, last = ask(client, stream=True)
    assert last.type == "response.incomplete"  # the echo never stops by itself
    assert client.responses.retrieve(last.response.id).to_dict() == last.response.to_dict()


@pytest.mark.parametrize("name", ["a", "one"])
def test_a_running_response_is_seen_and_cancelled_by_its_key_only(clients: Clients, name: str) -> None:
    client = clients[name]
    clients.replica.pause = 0.01
    try:
        stream = ask(client, max_output_tokens=LONG, stream=True)
        created = next(stream).response
        assert clients.replica.wait_running(1, 10)
        with pytest.raises(openai.NotFoundError):
            clients["b"].responses.cancel(created.id)
        if name == "a":  # else one request more is one too many
            running = client.responses.retrieve(created.id)
            assert (running.status, running.id) == ("in_progress", created.id)
            with pytest.raises(openai.BadRequestError, match="still running"):
                client.responses.delete(created.id)
            with pytest.raises(openai.BadRequestError, match="still running"):
                client.responses.input_items.list(created.id)
            with pytest.raises(openai.BadRequestError, match="still running"):
                ask(client, previous_response_id=created.id)
        cancelled = client.responses.cancel(created.id)
        assert (cancelled.status, cancelled.id) == ("cancelled", created.id)
        *_, last = stream
        assert clients.replica.wait_running(0, 10)
    finally:
        clients.replica.pause = 0.0
    assert (last.type, last.response.status) == ("response.incomplete", "cancelled")
    assert last.response.output[0].status == "incomplete"
    until(lambda: client.responses.retrieve(created.id).output == last.response.output)
    with pytest.raises(openai.BadRequestError, match=r"has ended \(cancelled\)"):
        client.responses.cancel(created.id)
    client.responses.delete(created.id)
    assert is_gone(client, created.id)


def test_one_that_has_ended_is_not_cancelled(clients: Clients) -> None:
    done = ask(clients["a"])
    with pytest.raises(openai.BadRequestError, match=r"has ended \(incomplete\)"):
        clients["a"].responses.cancel(done.id)


def test_of_a_client_that_leaves_nothing_is_stored(clients: Clients) -> None:
    client = clients["a"]
    clients.replica.pause = 0.01
    try:
        with ask(client, max_output_tokens=LONG, stream=True) as stream:
            id = next(stream).response.id
            assert clients.replica.wait_running(1, 10)
        assert clients.replica.wait_running(0, 30)
    finally:
        clients.replica.pause = 0.0
    until(lambda: is_gone(client, id))


def test_these_endpoints_need_a_key_and_count_for_its_limits(clients: Clients) -> None:
    http, path = clients.gateway.http, f"/v1/responses/resp_{'0' * 48}"
    asked: list[Callable[[dict[str, str]], httpx.Response]] = [
        lambda headers: http.get(path, headers=headers),
        lambda headers: http.get(f"{path}/input_items", headers=headers),
        lambda headers: http.delete(path, headers=headers),
        lambda headers: http.post(f"{path}/cancel", json={}, headers=headers),
        lambda headers: http.post("/v1/responses", json={"model": MODEL, "input": "Hi"}, headers=headers),
    ]
    assert [ask_for({}).status_code for ask_for in asked] == [401] * 5
    few = clients.headers("few")
    assert http.get(path, headers=few).status_code == 404
    # Cancelling is free: what uses up a limit must not be in the way of its end.
    assert [ask_for(few).status_code for ask_for in asked] == [429, 429, 429, 404, 429]


def test_a_stored_response_expires(model_dir: Path) -> None:
    with EchoReplica() as replica, RunningGateway(model_dir, replica, response_ttl=1) as gateway:
        made = ask(gateway.openai)
        until(lambda: is_gone(gateway.openai, made.id))
        with pytest.raises(openai.BadRequestError, match="expired") as refused:
            ask(gateway.openai, previous_response_id=made.id)
        assert refused.value.code == "previous_response_not_found"


def test_truncation_leaves_out_old_turns_where_they_do_not_fit(clients: Clients) -> None:
    words = "word " * 3000
    items = [{"role": "user", "content": f"{number} {words}"} for number in range(4)]
    fields = {"model": MODEL, "input": items, "max_output_tokens": 10}
    with pytest.raises(openai.BadRequestError, match="maximum context length is 8192") as refused:
        clients["a"].responses.create(**fields)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
    clients["a"].responses.create(**fields, truncation="auto")
    assert 6000 < clients.replica.requests[-1][0] < 8192  # two of them


def test_events_have_names_and_no_end_mark(clients: Clients) -> None:
    body = {"model": MODEL, "input": "Hi", "max_output_tokens": 2, "stream": True}
    got = clients.gateway.http.post("/v1/responses", json=body, headers=clients.headers("a"))
    assert got.headers["content-type"].startswith("text/event-stream")
    assert "[DONE]" not in got.text
    assert events_in(got.content)[-1]["type"] == "response.incomplete"


def test_ignored_fields_are_named(clients: Clients) -> None:
    body = {"model": MODEL, "input": "Hi", "max_output_tokens": 2, "prompt_cache_key": "k"}
    got = clients.gateway.http.post("/v1/responses", json=body, headers=clients.headers("a"))
    assert got.headers["X-Ignored-Fields"] == "prompt_cache_key"
    assert json.loads(got.content)["usage"]["output_tokens"] == 2


def test_several_workers_need_redis(model_dir: Path, redis: RunningRedis) -> None:
    redis.client.flushall()
    with EchoReplica() as replica:
        with RunningGateway(model_dir, replica, workers=2) as gateway:
            made = ask(gateway.openai)
            assert made.to_dict()["store"] is False
            with pytest.raises(openai.BadRequestError, match="only in Redis"):
                ask(gateway.openai, previous_response_id=made.id)
        with RunningGateway(model_dir, replica, workers=2, response_store=redis.url) as gateway:
            made = ask(gateway.openai)
            for _ in range(8):  # each on a connection of its own, which any worker takes
                with httpx.Client(trust_env=False) as client:
                    assert client.get(f"{gateway.url}/v1/responses/{made.id}").json()["id"] == made.id
            ask(gateway.openai, previous_response_id=made.id)
