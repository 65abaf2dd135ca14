"""quantization/gptq.py and awq.py against layers packed number by number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.quantized import LAYER, Layer, awq, gptq, save
from tidewright.layers.loading import load_weights
from tidewright.quantization.affine import AffineSource, QuantizationError
from tidewright.quantization.checkpoint import CheckpointError, open_checkpoint


def made(form: str, symmetric: bool) -> tuple[Layer, dict[str, torch.Tensor], dict[str, Any]]:
    # Outputs that don't fill their last word, where the format allows it.
    layer = Layer(96, 24 if form == "awq" else 21, 32, 8 if "8" in form else 4, symmetric)
    make: Callable[..., Any] = {"awq": awq, "gptq": gptq, "gptq 8": gptq, "gptq v2": lambda of: gptq(of, 2)}[form]
    return (layer, *make(layer))


def test_a_bias_of_zeros_where_the_architecture_has_none_is_left_out(tmp_path: Path) -> None:
    """AutoGPTQ gives one to every layer that it quantizes."""
    _, tensors, config = made("gptq", symmetric=True)
    bias, loaded = torch.zeros(21, dtype=torch.float16), list[object]()
    load_weights(save(tmp_path / "zero", tensors | {f"{LAYER}.bias": bias}, config), {f"{LAYER}.weight": loaded.append})
    assert len(loaded) == 1
    bias[20] = 1
    with pytest.raises(CheckpointError, match=rf"this architecture has no weight named {LAYER}\.bias"):
        load_weights(
            save(tmp_path / "other", tensors | {f"{LAYER}.bias": bias}, config), {f"{LAYER}.weight": loaded.append}
        )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("form", ["awq", "gptq", "gptq 8", "gptq v2"])
def test_reads_whole_and_cut(tmp_path: Path, form: str, symmetric: bool) -> None:
    layer, tensors, config = made(form, symmetric)
    bias = {f"{LAYER}.bias": torch.arange(3.0)}
    with open_checkpoint(save(tmp_path / "model", tensors | bias, config)) as weights:
        assert weights.keys() == {f"{LAYER}.weight", f"{LAYER}.bias"}
        source = weights[f"{LAYER}.weight"]
        assert isinstance(source, AffineSource)
        rows, columns = source.get_shape()
        assert (rows, columns) == tuple(layer.weight.shape)
        whole = source.cut(slice(0, rows), slice(0, columns))
        # scale * code + offset in place of scale * (code - zero): a few roundings.
        torch.testing.assert_close(whole.dequantized(), layer.weight, rtol=0, atol=1e-5)
        assert (whole.bits, whole.group_size) == (layer.bits, 32)
        assert (whole.offsets_FG is None) == (symmetric and form != "awq")
        if layer.bits == 4:
            assert whole.codes_FE.max() == (7 if whole.offsets_FG is None else 15)
        for part in ((slice(3, 13), slice(32, 96)), (slice(8, rows), slice(0, 32)), (slice(0, 1), slice(64, 96))):
            assert torch.equal(source.cut(*part).dequantized(), whole.dequantized()[part])
        with pytest.raises(QuantizationError, match="groups of 32 divide among 1, 3 ranks"):
            source.cut(slice(0, rows), slice(0, 48))


@pytest.mark.parametrize("has_order", [True, False])
@pytest.mark.parametrize(("form", "make"), [("gptq", gptq), ("awq", awq)])
def test_the_last_group_may_be_smaller(
    tmp_path: Path, form: str, make: Callable[[Layer], tuple[dict[str, torch.Tensor], dict[str, Any]]], has_order: bool
) -> None:
    """96 inputs in groups of 64 have two scales, which would fit two groups of 48 as well."""
    layer = Layer(96, 24, 64, 4, symmetric=False)
    tensors, config = make(layer)
    if not has_order:
        tensors.pop(f"{LAYER}.g_idx", None)
    with open_checkpoint(save(tmp_path / "model", tensors, config)) as weights:
        source = weights[f"{LAYER}.weight"]
        assert isinstance(source, AffineSource)
        whole = source.cut(slice(0, 24), slice(0, 96)).dequantized()
        torch.testing.assert_close(whole, layer.weight, rtol=0, atol=1e-5)
        assert torch.equal(source.cut(slice(0, 24), slice(64, 96)).dequantized(), whole[:, 64:])
    with pytest.raises(CheckpointError, match=r"has 2 scales for 96 inputs, but config\.json says groups of 32"):
        with open_checkpoint(save(tmp_path / "wrong", tensors, config | {"group_size": 32})):
            pass


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("gptq", {"bits": 3}, "GPTQ with 3 bits is not supported; use a checkpoint with 4 or 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        ("gptq", {"sym": True}, "zero points although config.json says sym"),
        ("awq", {"version": "gemv"}, "version 'gemv'.* is not supported; use"),
        ("awq", {"bits": 8}, "AWQ with 8 bits"),
        ("gptq", {"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes', which is not supported; there is awq"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, form: str, changes: dict[str, Any], message: str) -> None:
    _, tensors, config = made(form, symmetric=False)
    with pytest.raises((CheckpointError, QuantizationError), match=message):
        with open_checkpoint(save(tmp_path / "model", tensors, config | changes)) as weights:
            weights[f"{LAYER}.weight"].cut(slice(0, 1), slice(0, 32))


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, False)])
def test_inputs_in_the_order_of_activations(tmp_path: Path, bits: int, symmetric: bool) -> None:
    """desc_act: any cut will do, as no group lies in one piece anyway."""
    layer = Layer(208, 24, 64, bits, symmetric, is_ordered=True)  # the last group is smaller
    with open_checkpoint(save(tmp_path / "model", *gptq(layer))) as weights:
        source = weights[f"{LAYER}.weight"]
        assert isinstance(source, AffineSource)
        whole = source.cut(slice(0, 24), slice(0, 208))
        torch.testing.assert_close(whole.dequantized(), layer.weight, rtol=0, atol=1e-5)
        assert (whole.get_shape(), whole.group_size, whole.codes_FE.shape[1]) == ([24, 208], 64, 208)
        for part in ((slice(0, 24), slice(0, 104)), (slice(3, 11), slice(100, 207)), (slice(0, 1), slice(5, 6))):
            own = source.cut(*part)
            assert torch.equal(own.dequantized(), whole.dequantized()[part])
            assert own.get_shape() == list(whole.dequantized()[part].shape)
            assert own.group_size in (16, 32, 64)
        with pytest.raises(QuantizationError, match="can't be cut"):
            whole.columns(0, 64)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(96) // 24, "names group 3, but there are 3"),
        (torch.arange(96) // 32 - 1, "names group -1, but there are 3"),
        (torch.rand(96), r"stored as torch\.float32, expected whole numbers"),
        (torch.arange(95) // 32, "expected"),
    ],
)
def test_an_order_that_is_none(tmp_path: Path, order: torch.Tensor, message: str) -> None:
    _, tensors, config = made("gptq", symmetric=False)
    with pytest.raises(CheckpointError, match=message):
        with open_checkpoint(save(tmp_path / "model", tensors | {f"{LAYER}.g_idx": order}, config)):
            pass
    # Some writers leave it zero.
    zero = {f"{LAYER}.g_idx": torch.zeros(96, dtype=torch.int32)}
    with open_checkpoint(save(tmp_path / "zero", tensors | zero, config)) as weights:
        assert f"{LAYER}.weight" in weights


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_parts_that_do_not_fit_or_are_missing(tmp_path: Path, part: str) -> None:
    _, tensors, config = made("gptq", symmetric=False)
    name = f"{LAYER}.{part}"
    cut = {**tensors, name: tensors[name][:, :1].contiguous()}
    with pytest.raises(CheckpointError, match=r"expected|lacks"):
        with open_checkpoint(save(tmp_path / "cut", cut, config)):
            pass
    del cut[name]
    if part != "qweight":  # without which it is no quantized layer
        with pytest.raises(CheckpointError, match=f"lacks {part}"):
            with open_checkpoint(save(tmp_path / "missing", cut, config)):
                pass
