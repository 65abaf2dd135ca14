"""quantization/quantize_model.py: its folders against the library of their format, transformers and our own engine."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers.checkpoints import SIZES, engine_config, logits, prompt
from helpers.checkpoints import save as save_model
from tidewright.engine.model_runner import ModelRunner
from tidewright.quantization import quantize_model
from tidewright.quantization.affine import SCHEMES, AffineSource, QuantizationError, quantize_rtn
from tidewright.quantization.checkpoint import INDEX_FILE, open_checkpoint
from tidewright.quantization.quantize_model import QuantizationRun, Recipe

WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
QUIET = lambda done, total: None  # noqa: E731


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_model(folder, hf.LlamaConfig(**WIDE, tie_word_embeddings=False))
    return folder


def quantized(source: Path, target: Path, scheme: str, head: str | None = "int8", **recipe: Any) -> Path:
    target.mkdir(exist_ok=True)
    chosen = Recipe(SCHEMES[scheme], SCHEMES[head] if head else None, **recipe)
    QuantizationRun(source, target, chosen).run(QUIET)
    return target


def stored(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / INDEX_FILE).read_text())
    tensors = {
        name: tensor for file in set(index["weight_map"].values()) for name, tensor in load_file(folder / file).items()
    }
    assert tensors.keys() == index["weight_map"].keys()
    return tensors


@pytest.mark.parametrize("head", ["same", None])
@pytest.mark.parametrize("scheme", ["int8", "w8a8", "int4-g32", "int4-g64", "fp8"])
def test_the_library_and_ours_read_what_was_rounded(
    source: Path, tmp_path: Path, scheme: str, head: str | None
) -> None:
    folder = quantized(source, tmp_path / "q", scheme, scheme if head else None)
    tensors, original = stored(folder), load_file(source / "model.safetensors")
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(written)
    group = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group.format)
    with open_checkpoint(folder) as weights:
        assert weights.keys() == original.keys()
        for name, whole in original.items():
            layer = name.removesuffix(".weight")
            if whole.dim() == 1 or (head is None and "layers" not in name):
                assert torch.equal(tensors[name], whole)
                continue
            rounded = quantize_rtn(whole, SCHEMES[scheme]).dequantized()
            parts = {
                part.removeprefix(f"{layer}."): tensor for part, tensor in tensors.items() if part.startswith(layer)
            }
            theirs = compressor.decompress(parts, group)["weight"].float()
            source_weight = weights[name]
            assert isinstance(source_weight, AffineSource)
            ours = source_weight.cut(slice(0, whole.shape[0]), slice(0, whole.shape[1])).dequantized()
            torch.testing.assert_close(theirs, rounded, rtol=0, atol=1e-5)
            torch.testing.assert_close(ours, rounded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["int8", None])
@pytest.mark.parametrize("scheme", ["w8a8", "int4-g32"])
def test_the_bytes_needed_are_those_of_the_tensors(source: Path, tmp_path: Path, scheme: str, head: str | None) -> None:
    folder = quantized(source, tmp_path / "q", scheme, head)
    needed = QuantizationRun(source, folder, Recipe(SCHEMES[scheme], SCHEMES[head] if head else None)).bytes_needed()
    shapes = 16 * len([name for name in stored(folder) if name.endswith("weight_shape")])
    assert needed == sum(tensor.nbytes for tensor in stored(folder).values()) - shapes


def test_transformers_computes_what_we_do(source: Path, tmp_path: Path) -> None:
    folder = quantized(source, tmp_path / "q", "int4-g32", None)
    # As they come, it expects zero points in another shape than its library packs them in.
    whole = hf.CompressedTensorsConfig.from_dict(json.loads((folder / "config.json").read_text()))
    whole.dequantize = True
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=whole).eval()
    ids = prompt(20, 1)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    # Our kernels quantize activations as well.
    ours = logits(ModelRunner(engine_config(folder, quantization="none")), ids, chunk=20)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-4)


def test_gptq_has_less_error_in_outputs_than_rounding(source: Path, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    calibration = tuple(prompt(1500, 7))
    rounded = quantized(source, tmp_path / "rtn", "int4-g32", None)
    solved = quantized(source, tmp_path / "gptq", "int4-g32", None, calibration=calibration)
    ids = prompt(200, 8)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    plain = {"max_batched_tokens": 200, "quantization": "none"}
    errors = [
        float((logits(ModelRunner(engine_config(folder, **plain)), ids, 200) - expected).square().mean())
        for folder in (rounded, solved)
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("calibration", [(), tuple(prompt(300, 7))])
def test_an_interrupted_run_continues_and_ends_alike(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: tuple[int, ...]
) -> None:
    expected = stored(quantized(source, tmp_path / "at once", "int4-g32", calibration=calibration))

    def interrupt(done: int, total: int) -> None:
        if done > total / 4:
            raise KeyboardInterrupt

    target = tmp_path / "in parts"
    target.mkdir()
    recipe = Recipe(SCHEMES["int4-g32"], SCHEMES["int8"], calibration)
    with pytest.raises(KeyboardInterrupt):
        QuantizationRun(source, target, recipe).run(interrupt)
    first = {file: file.stat().st_mtime_ns for file in target.glob("*.safetensors")}
    assert first
    (target / "model-00003-of-00004.partial").write_bytes(b"half a layer")
    found = stored(quantized(source, target, "int4-g32", calibration=calibration))
    assert {file: file.stat().st_mtime_ns for file in first} == first
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_is_quantized_already_and_groups_that_do_not_divide(source: Path, tmp_path: Path) -> None:
    folder = quantized(source, tmp_path / "q", "int8")
    with pytest.raises(
        QuantizationError, match=r"quantized already \(compressed-tensors\); take the model that it was"
    ):
        quantized(folder, tmp_path / "again", "int8")
    with pytest.raises(
        QuantizationError, match=r"groups of 128 don't divide the inputs of .* \(64\); take int4-g32, int4-g64"
    ):
        quantized(source, tmp_path / "wide", "int4-g128")


def test_names_without_the_prefix(source: Path, tmp_path: Path) -> None:
    """As of models that were saved without their head."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = load_file(source / "model.safetensors")
    save_file({name.removeprefix("model."): one for name, one in weights.items()}, bare / "model.safetensors")
    calibration = tuple(prompt(300, 7))
    found, expected = (
        stored(quantized(folder, tmp_path / f"{number}", "int4-g32", None, calibration=calibration))
        for number, folder in enumerate((bare, source))
    )
    assert all(torch.equal(expected[name if name in expected else f"model.{name}"], one) for name, one in found.items())


def test_a_damaged_weight_is_named(source: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, damaged / "model.safetensors")
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        quantized(damaged, tmp_path / "q", "int8")


def test_a_disk_that_fills_while_a_file_is_written_is_an_error_of_the_system(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own error has only the text."""
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(quantize_model, "save_file", mock.Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left") as raised:
        quantized(source, tmp_path / "q", "int8")
    assert raised.value.errno == errno.ENOSPC
