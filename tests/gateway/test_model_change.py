"""Replicas of two models under one name, as while a model is changed: each gateway serves its own; nothing fails."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import msgspec
import pytest

from gateway.test_replica_set import DNS, Names
from helpers.echo_replica import EchoReplica
from helpers.gateway import MODEL, RunningGateway
from helpers.scripted_replicas import WELL, ScriptedClient, error, generate, named, run, until
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright_gateway.replicas.failover import Failover

OWN = msgspec.structs.replace(WELL, model="m", tokenizer="t", max_model_len=99)
OTHER = msgspec.structs.replace(WELL, model="other", tokenizer="o", max_model_len=7, embedding_size=4)


def test_replicas_of_another_model_change_nothing(
    client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither who is asked, nor how long prompts may be, nor what the gateway says it can do."""
    names = Names(monkeypatch, "a:1")
    client.status, client.scripts = {"a:1": OWN, "b:1": OTHER, "c:1": OTHER}, {"a:1": [[1]] * 20}

    async def body(failover: Failover) -> None:
        assert (failover.max_model_len, failover.embedding_sizes) == (99, {0})
        await names.say("a:1", "b:1", "c:1")
        await until(lambda: "serves other, not m" in named(failover, "c:1").why_not)
        for _ in range(9):
            assert (await generate(failover))[1].served_by == ["a:1"]
        assert (failover.max_model_len, failover.embedding_sizes) == (99, {0})

    run(body, **DNS)


def test_the_old_model_goes_away_and_comes_back(client: type[ScriptedClient], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback: with its last replica gone the gateway says what is there instead, and serves when one is back."""
    names = Names(monkeypatch, "a:1", "b:1")
    client.status, client.scripts = {"a:1": OWN, "b:1": OTHER}, {"a:1": [[1]] * 9}

    async def body(failover: Failover) -> None:
        await names.say("b:1")
        await until(lambda: [one.address for one in failover.replicas] == ["b:1"])
        assert "serves other, not m" in failover.trouble
        await names.say("a:1", "b:1")
        await until(lambda: not failover.trouble)
        assert (await generate(failover))[1].served_by == ["a:1"]

    run(body, **DNS)


def test_the_fallback_of_another_model_s_replica_is_not_asked(client: type[ScriptedClient]) -> None:
    """It may have the same tokenizer, as sizes of one family do, and is yet a model that nobody asked for."""
    same_tokenizer = msgspec.structs.replace(OTHER, tokenizer="t", embedding_size=0)
    client.status = {"a:1": error(Outcome.UNAVAILABLE), "b:1": same_tokenizer, "b:1/fallback": OWN}
    client.scripts = {"b:1/fallback": [[9]]}

    async def body(failover: Failover) -> None:
        with pytest.raises(ModelError):
            await generate(failover, fall_back=True)
        assert client.requests == []

    run(body, wait_for_replica=0.05)


def test_a_gateway_of_each_model_beside_the_other_and_a_switch_between_them(model_dir: Path, tmp_path: Path) -> None:
    """The procedure of docs/upgrades.md with real gateways: all replicas stand under one name, in one file here."""
    new_dir = tmp_path / "new-model"
    shutil.copytree(model_dir, new_dir, ignore=shutil.ignore_patterns("*.safetensors"))
    with EchoReplica(" old") as old, EchoReplica(" new") as new:
        old.status = msgspec.structs.replace(old.status, model=model_dir.name)
        new.status = msgspec.structs.replace(new.status, model="new-model")
        replicas = tmp_path / "replicas"
        replicas.write_text(old.grpc_url)
        options = {"replicas": f"file:{replicas}", "slow_start": 0}

        def text(gateway: RunningGateway) -> tuple[int, str]:
            answer = gateway.post("/v1/completions", {"prompt": "x", "max_tokens": 2})
            return answer.status_code, answer.json()["choices"][0]["text"] if answer.status_code == 200 else ""

        with RunningGateway(model_dir, **options) as before:
            assert text(before) == (200, " old old")
            replicas.write_text(f"{old.grpc_url}\n{new.grpc_url}\n")

            async def known() -> None:
                await until(lambda: f"serves new-model, not {model_dir.name}" in before.http.get("/admin/status").text)

            asyncio.run(known())
            with RunningGateway(new_dir, **options) as after:
                assert {text(before) for _ in range(5)} == {(200, " old old")}
                assert {text(after) for _ in range(5)} == {(200, " new new")}
                assert [one["id"] for one in after.http.get("/v1/models").json()["data"]] == [MODEL]
                replicas.write_text(new.grpc_url)  # after all callers have gone over
                assert {text(after) for _ in range(5)} == {(200, " new new")}
