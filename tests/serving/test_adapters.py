"""LoRA adapters on a real server behind a real gateway: loaded while it runs, and saying what PEFT says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from click.testing import CliRunner

from helpers.adapters import save_adapter
from helpers.byte_fallback import save_byte_fallback
from helpers.gateway import MODEL, RunningGateway
from helpers.triton import RunningServer
from tidewright.launch.cli import main
from tidewright.tokenization import Tokenizer

PROMPT = "the sea is"
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


class World:
    def __init__(
        self, server: RunningServer, gateway: RunningGateway, models: dict[str, Any], prompt: list[int]
    ) -> None:
        """`prompt`: the ids of PROMPT."""
        self.server, self.gateway, self._models, self._prompt = server, gateway, models, prompt

    def wanted(self, name: str) -> list[int]:
        """By transformers and PEFT."""
        ids = list(self._prompt)
        with torch.no_grad():
            for _ in range(GREEDY["max_tokens"]):
                ids.append(int(self._models[name](torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(self._prompt) :]

    def ask(self, name: str) -> list[int]:
        """Over the gateway."""
        body = {"model": name, "prompt": PROMPT, "return_token_ids": True, **GREEDY}
        answer = self.gateway.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        return list(answer.json()["choices"][0]["token_ids"])

    def load(self, name: str, path: str) -> tuple[int, str]:
        answer = self.gateway.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        return answer.status_code, answer.text

    def cli(self, *words: str) -> str:
        result = CliRunner().invoke(main, ["lora", *words, "--url", self.server.triton.http_url])
        return result.output


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("lora")
    folder, adapters = root / "model", root / "adapters"
    save_byte_fallback(folder, hf.LlamaConfig, "llama")
    base = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    models: dict[str, hf.PreTrainedModel | peft.PeftModel] = {MODEL: base}
    for seed, name in enumerate(("law", "sql"), 1):
        models[name] = save_adapter(base, adapters / name, seed)
    save_adapter(base, adapters / "wide", r=16)
    save_adapter(base, root / "outside")
    (adapters / "link").symlink_to(root / "outside")
    options: dict[str, Any] = {"adapter_folder": str(adapters), "adapters": "law=law", "max_lora_rank": 8}
    with (
        RunningServer(folder, dtype="float32", kv_cache_memory="16MiB", **options) as server,
        RunningGateway(folder, server) as gateway,
    ):
        yield World(server, gateway, models, Tokenizer(folder).encode(PROMPT))


def test_adapters_are_loaded_while_it_runs_and_say_what_peft_says(world: World) -> None:
    assert world.ask(MODEL) == world.wanted(MODEL)
    assert world.ask("law") == world.wanted("law")  # of the option `adapters`
    assert world.load("sql", "sql") == (200, "Success: LoRA adapter 'sql' added successfully.")
    assert world.ask("sql") == world.wanted("sql")
    assert world.ask("law") == world.wanted("law")
    assert len({tuple(world.wanted(name)) for name in (MODEL, "law", "sql")}) == 3

    for model in ("decoder", "failsafe"):
        made = world.server.generate(
            model=model, text_input=PROMPT, stream=True, sampling_parameters={**GREEDY, "lora_name": "sql"}
        )
        assert (made.error, made.token_ids) == (None, world.wanted("sql"))
    made = world.server.generate(text_input=PROMPT, sampling_parameters={**GREEDY, "lora_name": "tax"})
    assert "'tax'" in str(made.error)
    assert "law, sql" in str(made.error)
    listed = world.cli("list").splitlines()
    assert [line.split()[0] for line in listed] == ["law", "sql"]
    assert "loaded, rank 4" in listed[0]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("wide", "rank"),
        ("none", "there is no"),
        *((path, "is not below the allowed folder") for path in ("link", "../outside", "../none", "/", ".")),
    ],
)
def test_what_can_not_be_served_is_refused_with_the_reason(world: World, path: str, reason: str) -> None:
    status, text = world.load("bad", path)
    assert (status, json.loads(text)["error"]["code"]) == (400, "adapter_refused")
    assert reason in json.loads(text)["error"]["message"]
    assert world.ask(MODEL) == world.wanted(MODEL)


def test_no_adapter_takes_the_model_s_name_at_triton(world: World) -> None:
    name = world.server.triton.settings.model_name
    assert f"'{name}' is a model itself; choose another name" in world.cli("load", name, "law")
    assert name not in [line.split()[0] for line in world.cli("list").splitlines()]


def test_an_unloaded_adapter_is_gone_and_its_name_can_be_another(world: World) -> None:
    assert world.cli("load", "tax", "sql") == "Loaded tax.\n"  # at Triton itself
    assert world.ask("tax") == world.wanted("sql")  # which the gateway hears of
    assert world.cli("unload", "tax") == "Unloaded tax.\n"
    made = world.server.generate(text_input=PROMPT, sampling_parameters={**GREEDY, "lora_name": "tax"})
    assert "no adapter 'tax' is loaded" in str(made.error)
    assert world.cli("load", "tax", "law") == "Loaded tax.\n"
    assert world.ask("tax") == world.wanted("law")  # nothing of the other is cached
    assert world.gateway.http.post("/v1/unload_lora_adapter", json={"lora_name": "tax"}).status_code == 200
    answer = world.gateway.post("/v1/completions", {"model": "tax", "prompt": PROMPT})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
