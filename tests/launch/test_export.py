"""`export-onnx`, and the fallback that `prepare` makes: what is up to date, what is left behind, what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from helpers.checkpoints import prompt, save
from helpers.exports import save_tokenizer
from helpers.families import FAMILIES
from helpers.killed import run_until_killed
from helpers.own_cache import use_own_cache
from tidewright.cache import fallback_path, prepared_path
from tidewright.launch import export as export_module
from tidewright.launch.cli import main
from tidewright.onnx_export.manifest import MANIFEST, REPORT, Manifest, Report, read_manifest
from tidewright.onnx_export.session import OnnxDecoder
from tidewright.onnx_export.source import SourceModel
from tidewright.onnx_export.weights import write_model


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_cache(tmp_path / "cache", monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save(folder, FAMILIES["qwen 3"])
    save_tokenizer(folder)
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def exported(*arguments: str | Path) -> Path:
    result = run("export-onnx", *arguments)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip())


def refusal(*arguments: str | Path) -> str:
    """The one line of a command that fails, and leaves nothing behind."""
    before = everything(Path(os.environ["TIDEWRIGHT_CACHE"]) / "fallbacks")
    result = run(*arguments)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert everything(Path(os.environ["TIDEWRIGHT_CACHE"]) / "fallbacks") == before
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line


def everything(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.suffix != ".lock"}


def test_the_folder_holds_what_its_manifest_says(model: Path) -> None:
    folder = exported(model, "--precision", "both")
    assert folder == fallback_path(str(model))
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name.startswith("model.")}
    assert manifest.files["int8"] | manifest.files["float32"] == sizes
    assert list(manifest.files["int8"]) == ["model.int8.onnx", "model.int8.onnx.data"]
    assert (manifest.vocab_size, manifest.num_layers, manifest.num_kv_heads) == (131, 3, 2)
    assert (manifest.head_dim, manifest.max_length) == (12, 256)
    assert manifest.source.eos_token_ids == (2,)
    assert manifest.source.folder == str(prepared_path(str(model)))
    report = msgspec.json.decode((folder / REPORT).read_bytes(), type=Report)
    assert report.models["float32"].same_next_token == 1
    assert report.models["int8"].bytes == sum(manifest.files["int8"].values())
    wanted = SourceModel(model).greedy(prompt(20, seed=3), 8)
    assert OnnxDecoder(folder / "model.float32.onnx").greedy([prompt(20, seed=3)], 8) == [wanted]
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert everything(folder) == {*sizes, MANIFEST, REPORT, *tokenizer}
    for name in tokenizer:
        assert (folder / name).read_bytes() == (prepared_path(str(model)) / name).read_bytes()


def test_what_is_ready_is_not_made_again_until_something_changes(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"

    def makes(*arguments: str) -> bool:
        before = (target / MANIFEST).stat().st_ino
        result = run("export-onnx", model, "--output", target, *arguments)
        assert (result.exit_code, result.stdout) == (0, f"{target}\n")
        assert ("is up to date" in result.stderr) == ((target / MANIFEST).stat().st_ino == before)
        return "is up to date" not in result.stderr

    exported(model, "--output", target, "--precision", "both")
    assert not makes("--precision", "both")
    assert not makes("--precision", "float32")
    assert makes("--precision", "int8", "--force")
    assert makes("--precision", "float32")
    (target / "model.float32.onnx.data").write_bytes(b"cut")
    assert makes("--precision", "float32")
    prepared = prepared_path(str(model))
    (prepared / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert makes("--precision", "float32")
    os.utime(prepared / "model.safetensors", ns=(1, 1))
    assert makes("--precision", "float32")
    assert not makes("--precision", "float32")


def test_to_see_that_nothing_is_to_do_takes_no_torch(model: Path) -> None:
    exported(model)
    code = (
        "import sys; from click.testing import CliRunner; from tidewright.launch.cli import main\n"
        f"assert 'up to date' in CliRunner().invoke(main, ['export-onnx', {str(model)!r}]).stderr\n"
        f"assert 'up to date' in CliRunner().invoke(main, ['prepare', {str(model)!r}]).stderr\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ctrl_c_leaves_nothing_and_keeps_what_was_there(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        write_model(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tidewright.onnx_export.weights.write_model", interrupted)
        assert run("export-onnx", model).exit_code == 1
    target = fallback_path(str(model))
    assert everything(target.parent) == set()
    exported(model)
    with monkeypatch.context() as patch:
        patch.setattr("tidewright.onnx_export.weights.write_model", interrupted)
        assert run("export-onnx", model, "--force").exit_code == 1
    assert read_manifest(target)
    assert [path.name for path in target.parent.iterdir() if path.suffix != ".lock"] == [target.name]


@pytest.mark.heavy
def test_a_killed_run_leaves_nothing_that_looks_ready(model: Path) -> None:
    code = (
        "import time; from tidewright.launch.cli import main; from tidewright.onnx_export import weights\n"
        f"weights.write_model = lambda graph, tensors, file, progress: (file.touch(), time.sleep(60))\n"
        f"main(['export-onnx', {str(model)!r}])"
    )
    target = fallback_path(str(model))
    partial = target.with_name(f".{target.name}.partial")
    run_until_killed(code, partial / "model.int8.onnx")
    assert partial.exists()
    assert not target.exists()
    assert exported(model) == target
    assert not partial.exists()


def test_a_folder_of_something_else_is_not_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("")
    assert "is not an exported model" in refusal("export-onnx", model, "--output", tmp_path / "notes")
    assert "is not an exported model" in refusal("export-onnx", model, "--output", tmp_path / "notes" / "precious.txt")
    assert (tmp_path / "notes" / "precious.txt").exists()
    (tmp_path / "empty").mkdir()
    assert exported(model, "--output", tmp_path / "empty") == tmp_path / "empty"


def test_too_little_space_is_said_before_anything_is_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(model)._replace(free=100_000)
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr("tidewright.onnx_export.weights.write_model", None)
    assert "MB in" in (line := refusal("export-onnx", model))
    assert "0 MB are free; free some space" in line


def test_a_disk_that_fills_up_all_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tidewright.onnx_export.weights.write_model", full)
    assert "is full" in refusal("export-onnx", model)


def test_missing_packages_are_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    line = refusal("export-onnx", model)
    assert "needs onnx and onnxruntime; run: pip install 'tidewright[server,fallback]'" in line


def test_sources_that_cannot_be_exported(model: Path, tmp_path: Path) -> None:
    assert "no file or folder 'nowhere'" in refusal("export-onnx", "nowhere")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert "GPT2LMHeadModel is not supported; there is: Gemma2ForCausalLM, Gemma3" in refusal("export-onnx", model)
    (model / "config.json").write_text(json.dumps(config))
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert run("prepare", model, "--no-fallback", "--force").exit_code == 0
    assert "is not a readable safetensors file" in refusal("export-onnx", model)


@pytest.mark.heavy
def test_prepare_makes_the_fallback_too(model: Path) -> None:
    target = fallback_path(str(model))
    assert run("prepare", model, "--no-fallback").stdout == f"{prepared_path(str(model))}\n"
    assert not target.exists()
    assert run("prepare", model).stdout == f"{prepared_path(str(model))}\n"
    manifest = read_manifest(target)
    assert manifest
    assert list(manifest.files) == ["int8"]


def test_prepare_says_that_a_ready_model_has_no_fallback(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run("prepare", model)
    assert (result.exit_code, result.stdout) == (1, f"{prepared_path(str(model))}\n")
    assert f"{model} is ready, but its fallback is not: exporting needs onnx and" in result.stderr
    assert "--no-fallback" in result.stderr


@pytest.mark.parametrize("shift", [0, 1])
def test_a_fallback_of_another_model(model: Path, tmp_path: Path, shift: int) -> None:
    other = tmp_path / "other"
    save(other, FAMILIES["llama, tied"])
    save_tokenizer(other, shift)
    result = run("prepare", model, "--fallback-model", other)
    assert (result.exit_code, result.stdout) == (0, f"{prepared_path(str(model))}\n")
    assert ("has another tokenizer than" in result.stderr) == bool(shift)
    assert not fallback_path(str(model)).exists()
    manifest = read_manifest(fallback_path(str(other)))
    assert manifest
    assert manifest.source.folder == str(prepared_path(str(other)))
