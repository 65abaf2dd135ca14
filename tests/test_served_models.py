"""Several models in one server: names, options of their own, and parts of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import ValidationError

from tidewright.config import OF_A_MODEL, Settings
from tidewright.engine.messages import EngineConfig
from tidewright.launch.options import settings_from
from tidewright.served_models import RESERVED_NAMES, served_name, split
from tidewright_gateway.config import GatewaySettings

TWO: Any = [{"name": "small", "model": "./b", "dtype": "float32", "max_model_len": 9}]


@pytest.mark.parametrize("settings", [Settings, GatewaySettings])
def test_the_flag_comes_several_times(settings: Any) -> None:
    made = settings_from(settings, {"model": ("big=./a", "small=org/b@main", "./c"), "port": None})
    assert (made.model, made.model_name) == ("./a", "big")
    assert [(one.name, one.model) for one in made.models] == [("small", "org/b@main"), ("c", "./c")]
    assert settings_from(settings, {"model": ("./a",)}).models == []
    with pytest.raises(click.ClickException, match="two models are named 'a'"):
        settings_from(settings, {"model": ("./a", "x/a")})


def test_a_variable_has_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEWRIGHT_MODELS", "small=./b, org/c")
    assert Settings().names == ["smollm2-135m", "small", "c"]
    monkeypatch.setenv("TIDEWRIGHT_MODELS", '["small=./b"]')
    assert Settings().names == ["smollm2-135m", "small"]


def test_names_of_sources(tmp_path: Path) -> None:
    assert (served_name("org/name@main"), served_name("./x/y"), served_name("m.gguf")) == ("name", "y", "m.gguf")
    assert split("a=b=c") == ("a", "b=c")
    assert split("./a=b") == ("", "./a=b")
    folder = tmp_path / "a=b"
    folder.mkdir()
    assert split(str(folder)) == ("", str(folder))


def test_a_model_has_its_own_options_and_else_the_server_s() -> None:
    settings = Settings(models=TWO, max_running=3, fallback="auto", degradation=True)
    first, second = (settings.of(name) for name in settings.names)
    assert first == settings.model_copy(update={"models": [], "kv_cache_share": 0.5})
    assert (second.model, second.dtype, second.max_model_len, second.max_running) == ("./b", "float32", 9, 3)
    assert (second.fallback, second.degradation) == ("", False)  # of the first alone
    with pytest.raises(KeyError):
        settings.of("nobody")


def test_the_stubs_and_the_printed_file_have_the_same_models(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(models=[*TWO, {"model": "./c", "load": False}])
    assert Settings(**settings.model_dump()) == settings
    for name, value in settings.as_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_each_option_of_an_engine_is_a_model_s_or_the_server_s() -> None:
    """A new one belongs in one of the two groups."""
    of_server = {"memory_budget", "kv_cache_memory", "heartbeat_interval", "heartbeat_timeout", "start_timeout"}
    of_server |= {"nodes", "rendezvous", "rendezvous_secret_file"}  # of which several models have none
    of_engine = set(EngineConfig.__struct_fields__) & set(Settings.model_fields)
    assert of_engine == (set(OF_A_MODEL) & of_engine) | of_server
    assert set(OF_A_MODEL) - of_engine == {"adapters"}
    documented = (Path(__file__).parent.parent / "docs" / "serving.md").read_text().partition("## Several models")[2]
    assert all(f"`{name}`" in documented for name in OF_A_MODEL)


def test_no_further_model_has_the_name_of_one_of_the_first_in_triton() -> None:
    """`generate_direct` exists, and `decoder` means the first at Triton."""
    root = Path(__file__).parent.parent
    repositories = (root / "model_repository", root / "ensemble")
    shipped = {folder.name for where in repositories for folder in where.iterdir() if folder.is_dir()}
    assert {name.rpartition("_")[2] for name in shipped} == {*RESERVED_NAMES}
    for name in RESERVED_NAMES:
        for settings in (Settings, GatewaySettings):
            with pytest.raises(ValidationError, match=f"'{name}' can't be the name of a model beside the first"):
                settings(models=[f"{name}=./b"])
        assert Settings(served_model_name=name, models=["b=./b"]).names == [name, "b"]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((0, 0), (0.5, 0.5)), ((0.75, 0), (0.75, 0.25)), ((0, 0.2, 0), (0.4, 0.2, 0.4)), ((0.5, 0.25), (0.5, 0.25))],
)
def test_one_budget_is_divided(shares: tuple[float, ...], expected: tuple[float, ...]) -> None:
    further = [{"name": f"m{number}", "model": "x", "kv_cache_share": share} for number, share in enumerate(shares[1:])]
    settings = Settings(kv_cache_share=shares[0], models=further)
    got = [settings.of(name).engine_config(Path()).kv_cache_share for name in settings.names]
    assert got == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": [{"model": "./b", "http_port": 1}]}, "b can't have http_port of its own; what a model can have is"),
        ({"models": [{"model": "./b", "dtype": "int3"}]}, "models: b: dtype: Input should be 'bfloat16'"),
        ({"models": [{"model": "./b", "kv_cache_share": 2}]}, "models: b: kv_cache_share: .*less than or equal to 1"),
        ({"models": [{"model": "./b", "kv_cache_share": 0.6}], "kv_cache_share": 0.6}, "are 1.2, more than 1"),
        ({"models": ["./b"], "kv_cache_share": 1.0}, "leave nothing for the models without one"),
        ({"models": [{"model": "./b", "task": "embed"}], "speculative_tokens": 1}, "models: b: its options: specul"),
        ({"models": [{"name": "a/b", "model": "./b"}]}, "String should match pattern"),
        ({"models": ["/"]}, "'/' needs a name"),
        ({"models": [{"name": "b"}]}, "models.0.model"),
        ({"models": [3]}, "models.0"),
        ({"models": "[3"}, "is not valid JSON"),
        ({"models": [f"m{number}=x" for number in range(16)]}, "at most 15 items"),
        ({"models": ["./b"], "nodes": 2, "tensor_parallel_size": 2, "rendezvous": "h:1"}, "need nodes: 1"),
        ({"models": ["smollm2-135m"]}, "two models are named 'smollm2-135m'"),
    ],
)
def test_bad_models_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings(**options)
