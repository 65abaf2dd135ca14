"""Settings: where values come from, what wins, and what is refused."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel, ValidationError

from tidewright.config import Settings
from tidewright.kv_cache.budget import parse_memory
from tidewright.launch.cli import main
from tidewright.resilience.config import ResilienceSettings
from tidewright.served_models import smaller_name
from tidewright_gateway.config import GROUPS, GatewaySettings

DOCS = Path(__file__).parent.parent / "docs"
OPTIONS = runpy.run_path(str(DOCS / "make_options.py"))


def test_flags_win_over_the_environment_and_that_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "serving.yaml"
    file.write_text("http_port: 9001\ngrpc_port: 9002\nmetrics_port: 9003\n")
    monkeypatch.setenv("TIDEWRIGHT_CONFIG", str(file))
    monkeypatch.setenv("TIDEWRIGHT_GRPC_PORT", "9102")
    monkeypatch.setenv("TIDEWRIGHT_METRICS_PORT", "9103")
    settings = Settings(metrics_port=9203)
    assert (settings.http_port, settings.grpc_port, settings.metrics_port) == (9001, 9102, 9203)


def test_an_unknown_key_in_the_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "serving.yaml"
    file.write_text("http_prot: 9001\n")
    monkeypatch.setenv("TIDEWRIGHT_CONFIG", str(file))
    with pytest.raises(ValueError, match=r"serving\.yaml: there is no option http_prot; did you mean http_port\?"):
        Settings()


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEWRIGHT_CONFIG", "/nowhere/serving.yaml")
    with pytest.raises(ValueError, match=r"/nowhere/serving\.yaml: No such file"):
        Settings()


def test_the_stubs_read_the_same_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(dtype="float32", max_waiting=7, heartbeat_timeout=12.5, kv_cache_memory="10%")
    for name, value in settings.as_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"http_port": 8001}, "must differ"),
        ({"http_port": 0}, "http_port"),
        ({"device": "tpu"}, "device"),
        ({"kv_cache_memory": "lots"}, "not an amount of memory"),
        ({"kv_cache_memory": "120%"}, "not an amount of memory"),
        ({"heartbeat_interval": 5, "heartbeat_timeout": 6}, "at least twice"),
        ({"breaker_cool_down": 60}, "breaker_cool_down must be at most breaker_cool_down_max"),
        ({"task": "score"}, "task"),
        ({"pooling": "cls"}, "pooling"),
        ({"task": "embed", "fallback": "auto"}, "fallback is for generated text"),
        ({"pooling": "mean"}, "add task: embed"),
        ({"task": "embed", "speculative_tokens": 2}, "speculative_tokens is for generated text"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 3, "nodes": 2, "rendezvous": "h:1"}, "3, which 2 nodes can't share equally"),
        ({"device": "cuda:0,1"}, "names 2 different GPUs, but each host has 1 rank;"),
        ({"device": "cuda:0,1", "tensor_parallel_size": 3}, "but each host has 3 ranks"),
        ({"device": "cuda:0,"}, "device"),
        ({"tensor_parallel_size": 2, "nodes": 2}, "nodes > 1 and rendezvous go together"),
        ({"tensor_parallel_size": 2, "rendezvous": "h:1"}, "nodes > 1 and rendezvous go together"),
        *(
            ({"tensor_parallel_size": 2, "nodes": 2, "rendezvous": text}, "must be HOST:PORT")
            for text in ("somewhere", ":1", "h:", "h:0", "h:65536", "h:²", "h i:1", "::1:5", "a..b:1", "0.0.0.0:9")
        ),
    ],
)
def test_bad_values_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings(**options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1GiB", 2**30), ("512 MiB", 2**29), ("1.5GB", 1_500_000_000), ("100", 100), ("25%", 250), ("100%", 1000)],
)
def test_parse_memory(text: str, expected: int) -> None:
    assert parse_memory(text, free=1000) == expected


def test_the_engine_gets_what_the_settings_say(tmp_path: Path) -> None:
    config = Settings(device="cpu", kv_cache_memory="10%", max_running=3).engine_config(tmp_path)
    assert (config.model_dir, config.device, config.kv_cache_memory) == (str(tmp_path), "cpu", "10%")
    assert config.max_running == 3
    quantized = Settings(kv_cache_dtype="fp8")
    assert quantized.engine_config(tmp_path).cache_format == "fp8"
    assert Settings(dtype="float32").engine_config(tmp_path).cache_format == "float32"
    assert quantized.fallback_engine_config(tmp_path).kv_cache_dtype == "auto"


@pytest.mark.parametrize("file", OPTIONS["PAGES"])
def test_the_tables_of_options_are_what_the_code_makes(file: str) -> None:
    page = (DOCS / file).read_text()
    assert OPTIONS["PAGES"][file](page) == page, "python docs/make_options.py"


@pytest.mark.parametrize(("file", "settings"), [("configuration.md", Settings), ("serving.md", GatewaySettings)])
def test_every_option_has_one_row_with_the_bounds_that_are_enforced(file: str, settings: type[BaseModel]) -> None:
    """What is behind a bound is refused for it, and the bound is not; whatever else stands in the way of it."""
    text = (DOCS / file).read_text()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines()]
    found = {cells[0].strip("`"): cells for cells in rows if len(cells) == 5 and cells[0].startswith("`")}
    elsewhere = ResilienceSettings.model_fields.keys() if settings is GatewaySettings else set()
    assert found.keys() == settings.model_fields.keys() - elsewhere
    assert (
        OPTIONS["SERVE"] | OPTIONS["GATEWAY"]
    ).keys() <= Settings.model_fields.keys() | GatewaySettings.model_fields.keys()

    def is_refused(name: str, value: object) -> bool:
        try:
            settings(**{name: value})
        except ValidationError as error:
            return any(one["loc"] == (name,) for one in error.errors())
        return False

    for name, cells in found.items():
        for bound in re.findall(r"(?<=, )(?:[\d.]+) or more|(?:[\d.]+) to (?:[\d.]+)|more than [\d.]+", cells[1]):
            least, most = [*re.findall(r"[\d.]+", bound), "inf"][:2]
            kind = int if cells[1].startswith("integer") else float
            assert is_refused(name, kind(float(least)) - 1), name
            assert is_refused(name, kind(float(least))) == bound.startswith("more than"), name
            if most != "inf":
                assert is_refused(name, kind(float(most)) + 1), name
                assert not is_refused(name, kind(float(most))), name
        for value in re.findall(r"`(\w[\w-]*)`", cells[1]):
            assert not is_refused(name, value), (name, value)


def test_the_gateway_s_groups_have_each_option_once() -> None:
    names = [name for group in GROUPS.values() for name in group.model_fields]
    assert sorted(names) == sorted(GatewaySettings.model_fields)


def test_what_the_gateway_prints_it_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "replicas").write_text("a:1\n")
    given = {"replicas": f"file:{tmp_path}/replicas", "port": 9090, "degradation": True, "retry_max_attempts": 2}
    settings = GatewaySettings(**given)
    file = tmp_path / "gateway.yaml"
    file.write_text(yaml.safe_dump(settings.in_groups(), sort_keys=False))
    monkeypatch.setenv("TIDEWRIGHT_GATEWAY_CONFIG", str(file))
    assert GatewaySettings() == settings
    monkeypatch.setenv("TIDEWRIGHT_GATEWAY_PORT", "9091")
    assert GatewaySettings().port == 9091
    assert GatewaySettings(port=9092).port == 9092


def test_no_password_is_printed() -> None:
    settings = GatewaySettings(keys="redis://user:secret@h:1/0", limits_store="rediss://:secret@h:1")
    assert "secret" not in yaml.safe_dump(settings.in_groups())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server: {modle: a}", "gateway.yaml: there is no option modle in server; did you mean model?"),
        ("port: 1", "gateway.yaml: port belongs under server:, indented"),
        ("routing: {port: 1}", "gateway.yaml: port belongs under server:, indented"),
        ("sever: {port: 1}", "gateway.yaml: there is no option sever; did you mean server?"),
        ("server: 5", "gateway.yaml: server must have options of its own"),
        ("server:\n  port: [1\n", "gateway.yaml:3: not YAML"),
        ("server: {port: 1}\nauth: {keys: a}\nserver:\n  host: b\n", "gateway.yaml:3: not YAML: server a second time"),
        ("server:\n  port: 1\n  port: 2\n", "gateway.yaml:3: not YAML: port a second time"),
        ("- a", "gateway.yaml: must have options, in groups, such as `server: {port: 8080}`"),
        ("\x00", "gateway.yaml: not YAML"),
    ],
)
def test_what_is_wrong_with_the_gateway_s_file_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(text)
    monkeypatch.setenv("TIDEWRIGHT_GATEWAY_CONFIG", str(file))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        GatewaySettings()
    assert "\n" not in str(caught.value)


# The version of the files.


@pytest.mark.parametrize(
    ("settings", "variable"), [(Settings, "TIDEWRIGHT_CONFIG"), (GatewaySettings, "TIDEWRIGHT_GATEWAY_CONFIG")]
)
@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1", ""),
        ("2", "reads version 1 only: start the newer Tidewright that the file is for, or use the file from before"),
        ("0", "version is 0, but must be 1"),
        ("true", "version is True, but must be 1"),
        ("1.0", "version is 1.0, but must be 1"),
        ("'1'", "version is '1', but must be 1"),
        ("", "version is None, but must be 1"),
        ("[1]", r"version is [1], but must be 1"),
    ],
)
def test_a_file_may_say_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: type[Any], variable: str, version: str, said: str
) -> None:
    """What a later one has besides is not looked at: its options are not known here."""
    file = tmp_path / "options.yaml"
    file.write_text(f"version: {version}\n" + ("an_option_of_the_future: 1\n" if version == "2" else ""))
    monkeypatch.setenv(variable, str(file))
    if not said:
        settings()
        return
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        settings()
    assert str(file) in str(caught.value)


def test_serve_prints_its_options_and_reads_them(tmp_path: Path) -> None:
    printed = CliRunner().invoke(main, ["serve", "--print-config", "--max-running", "7"])
    assert printed.exit_code == 0
    assert printed.stdout.startswith("version: 1\nmodel: smollm2-135m\n")
    (tmp_path / "serving.yaml").write_text(printed.stdout)
    again = CliRunner().invoke(main, ["serve", "--print-config", "--config", str(tmp_path / "serving.yaml")])
    assert again.stdout == printed.stdout
    assert "max_running: 7\n" in again.stdout


def test_adapters_are_a_list_of_names_and_paths_below_the_folder() -> None:
    settings = Settings(adapter_folder="adapters", adapters="sql=sql-v2, law=/a/law=1,")
    assert settings.adapter_paths == {"sql": "sql-v2", "law": "/a/law=1"}
    assert Settings().adapter_paths == {}
    for wrong, message in (
        ("sql", "'sql' must be NAME=PATH"),
        ("sql=", "must be NAME=PATH"),
        ("=a", "'' must have 1 to 128"),
        ("a b=c", "'a b' must have"),
        ("a=b,a=c", "a stands twice"),
        (",".join(f"a{number}=p" for number in range(257)), "257 adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(adapter_folder="adapters", adapters=wrong)
    with pytest.raises(ValueError, match="adapters need adapter_folder"):
        Settings(adapters="a=b")


def test_a_length_without_output_is_refused() -> None:
    with pytest.raises(ValueError, match="max_model_len is 1, which leaves no token for the output"):
        Settings(max_model_len=1)
    assert Settings(max_model_len=1, task="embed").max_model_len == 1
    assert Settings(max_model_len=2).max_model_len == 2


def test_no_adapter_has_the_name_of_a_model() -> None:
    for models in ([], [{"name": "q", "model": "m"}]):
        with pytest.raises(ValueError, match="adapters: 'tide' is a model itself; choose another name"):
            Settings(served_model_name="tide", adapter_folder="adapters", adapters="tide=p", models=models)
    for own, name in (({}, "q"), ({"adapters": "tide=p"}, "tide")):
        further = [{"name": "q", "model": "m", **own}]
        with pytest.raises(ValueError, match=f"adapters: '{name}' is a model itself"):
            Settings(served_model_name="tide", adapter_folder="adapters", adapters="" if own else "q=p", models=further)


def test_a_smaller_variant_is_one_more_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(model="org/name", smaller_variant="int8", quantize_head="same")
    assert settings.names == ["name", "name-small"]
    small = settings.of("name-small")
    assert (small.model, small.quantization, small.quantize_head, small.smaller_variant) == (
        "org/name",
        "int8",
        "same",
        "",
    )
    assert [settings.of(name).kv_cache_share for name in settings.names] == [0.75, 0.25]
    # The stubs of the server read it again, when the model has become a folder.
    of_server = settings.model_copy(update={"model": str(tmp_path), "served_model_name": "name"})
    for name, value in of_server.as_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings().names == settings.names
    monkeypatch.undo()
    elsewhere = Settings(model="org/name", smaller_variant=str(tmp_path), models=["other=x"])  # type: ignore[list-item]
    assert {one.name: one.model for one in elsewhere.models} == {"other": "x", "name-small": str(tmp_path)}
    with pytest.raises(ValueError, match="smaller_variant is for models that generate"):
        Settings(smaller_variant="int8", task="embed")


@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("org/llama", "org-llama-small"),
        ("Modell für alles:1", "Modell-f-r-alles-1-small"),
        ("._x" + "y" * 99, "x" + "y" * 57 + "-small"),
        ("\u6a21\u578b", "model-small"),
    ],
)
def test_a_smaller_variant_of_any_name_has_one_that_triton_takes(name: str, smaller: str) -> None:
    settings = Settings(served_model_name=name, smaller_variant="int8")
    assert settings.names == [name, smaller]
    assert smaller_name(name) == smaller  # as the gateway is told


@pytest.mark.parametrize(
    ("variant", "quantization", "message"),
    [
        ("fp8", "auto", "smaller_variant can't be 'fp8'; write one of int8, w8a8, int4-g32"),
        ("none", "auto", "smaller_variant can't be 'none'"),
        ("int4", "auto", "can't be 'int4'.* or a folder"),
        ("int8", "int8", "smaller_variant is int8, as quantization is"),
        ("fp8", "fp8", "smaller_variant is fp8, as quantization is"),
    ],
)
def test_a_smaller_variant_that_is_none_is_refused(variant: str, quantization: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(smaller_variant=variant, quantization=quantization)
