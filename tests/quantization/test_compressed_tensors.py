"""quantization/compressed_tensors.py against the library that defines the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from helpers.quantized import LAYER, save
from tidewright.quantization.affine import AffineSource, QuantizationError
from tidewright.quantization.checkpoint import CheckpointError, open_checkpoint

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8 per channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 per tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "int8 in groups, zero points": (
        "int-quantized",
        {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int8 packed": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4, zero points": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "fp8 per channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 per tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
}
ROWS, COLUMNS = 21, 96


def compressed(form: str, args: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any], torch.Tensor]:
    """Tensors of a layer, quantization_config, and what the library makes of the tensors."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    generator = torch.Generator().manual_seed(0)
    per_row = args.get("group_size", COLUMNS)
    scales = (1,) if args["strategy"] == "tensor" else (ROWS, COLUMNS // per_row)
    state = {
        "weight": torch.randn(ROWS, COLUMNS, generator=generator),
        "weight_scale": 0.02 + 0.2 * torch.rand(scales, generator=generator),
    }
    if not args.get("symmetric", True):
        half = 2 ** (args["num_bits"] - 1)
        state["weight_zero_point"] = torch.randint(-half, half, scales, generator=generator, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    whole = compressor.decompress(stored, scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": scheme.model_dump()}}
    return {f"{LAYER}.{part}": tensor for part, tensor in stored.items()}, config, whole


@pytest.mark.parametrize("name", FORMATS)
def test_reads_what_the_library_writes(tmp_path: Path, name: str) -> None:
    form, args = FORMATS[name]
    tensors, config, expected = compressed(form, args)
    with open_checkpoint(save(tmp_path / "model", tensors, config)) as weights:
        assert weights.keys() == {f"{LAYER}.weight"}
        source = weights[f"{LAYER}.weight"]
        assert isinstance(source, AffineSource)
        assert source.get_shape() == [ROWS, COLUMNS]
        whole = source.cut(slice(0, ROWS), slice(0, COLUMNS))
        torch.testing.assert_close(whole.dequantized(), expected.float(), rtol=0, atol=1e-5)
        assert (whole.bits, whole.is_float) == (args["num_bits"], "fp8" in name)
        assert (whole.offsets_FG is None) == args.get("symmetric", True)
        for part in ((slice(3, 13), slice(32, 96)), (slice(8, ROWS), slice(0, 32))):
            if args["strategy"] == "group" or args["num_bits"] == 8:
                assert torch.equal(source.cut(*part).dequantized(), whole.dequantized()[part])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "the format 'nvfp4-pack-quantized' is not supported; run `tidewright"),
        ({"config_groups": {"a": {"weights": {"num_bits": 3}}}}, "weights of type int and 3 bits"),
        ({"config_groups": {"a": {"weights": {"strategy": "block"}}}}, "the strategy 'block' of weights"),
        ({"config_groups": {"a": {"input_activations": {"num_bits": 4}}}}, "activations of 4 bits"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transforms of activations"),
        ({"config_groups": {"a": None}}, "the group None"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tensors, config, _ = compressed(*FORMATS["int4"])
    with pytest.raises(CheckpointError, match=message):
        with open_checkpoint(save(tmp_path / "model", tensors, config | changes)):
            pass


@pytest.mark.parametrize("part", ["weight_shape", "weight_packed", "weight_zero_point"])
def test_numbers_that_are_not_whole_are_damage(tmp_path: Path, part: str) -> None:
    tensors, config, _ = compressed(*FORMATS["int4, zero points"])
    tensors[f"{LAYER}.{part}"] = tensors[f"{LAYER}.{part}"].float()
    with pytest.raises((CheckpointError, QuantizationError), match=r"stored as torch\.float32, expected"):
        with open_checkpoint(save(tmp_path / "model", tensors, config)) as weights:
            weights[f"{LAYER}.weight"].cut(slice(0, ROWS), slice(0, COLUMNS))  # type: ignore[union-attr]


def test_scales_of_activations_and_of_a_kv_cache_are_left_out(tmp_path: Path) -> None:
    """Those of a KV cache stand beside projections, quantized or not, or with the attention."""
    tensors, config, _ = compressed(*FORMATS["fp8 per tensor"])
    wanted = {*tensors} - {f"{LAYER}.weight_scale"}
    extra = [f"{LAYER}.{part}" for part in ("input_scale", "input_zero_point", "output_scale", "k_scale")]
    attention = "model.layers.0.self_attn"
    extra += [f"{attention}.{part}" for part in ("k_scale", "v_scale", "q_scale", "kv_scale", "v_proj.output_scale")]
    scales = {name: torch.ones(1) for name in extra}
    with open_checkpoint(save(tmp_path / "model", tensors | scales, config)) as weights:
        assert {*weights} == wanted


@pytest.mark.parametrize("name", ["int4", "int4, zero points"])
def test_the_order_of_activations(tmp_path: Path, name: str) -> None:
    """actorder: group. An input has the scale of its group, wherever that lies."""
    tensors, config, _ = compressed(*FORMATS[name])
    groups = torch.arange(COLUMNS) // 32
    apart = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    with open_checkpoint(save(tmp_path / "plain", tensors, config)) as weights:
        plain = weights[f"{LAYER}.weight"].cut(slice(0, ROWS), slice(0, COLUMNS))  # type: ignore[union-attr]
    offsets = plain.offsets_FG[:, groups[apart]] if plain.offsets_FG is not None else 0
    expected = plain.codes_FE.float() * plain.scales_FG[:, groups[apart]] + offsets
    tensors[f"{LAYER}.weight_g_idx"] = groups[apart]
    with open_checkpoint(save(tmp_path / "model", tensors, config)) as weights:
        source = weights[f"{LAYER}.weight"]
        assert isinstance(source, AffineSource)
        assert torch.equal(source.cut(slice(0, ROWS), slice(0, COLUMNS)).dequantized(), expected)
        assert torch.equal(source.cut(slice(4, 9), slice(10, 60)).dequantized(), expected[4:9, 10:60])
