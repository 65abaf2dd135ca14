"""devices/cpu/quantized_linear.py: loading plain and quantized weights, cuts, and the engine with quantized layers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import checkpoints, families
from helpers.on_disk import OnDisk
from helpers.quantized import LAYER, Layer, gptq, save
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.base import Device
from tidewright.devices.cpu import linear
from tidewright.devices.cpu.device import CpuDevice
from tidewright.distributed.sharding import Cut
from tidewright.engine.model_runner import ModelRunner
from tidewright.layers.linear_method import LinearMethod
from tidewright.quantization.affine import QuantizationError, quantize_rtn, scheme_named
from tidewright.quantization.checkpoint import open_checkpoint
from tidewright.quantization.choice import Quantization, choose
from tidewright.quantization.hardware import Hardware
from tidewright.quantization.quantize_model import QuantizationRun, Recipe

HERE = Hardware("here")
pytestmark = pytest.mark.usefixtures("all_cores")


def device(quantization: Quantization, kind: type[Device] = CpuDevice) -> Device:
    attention = ReferenceAttention(16, torch.device("cpu"))
    made = CpuDevice(attention) if kind is CpuDevice else Device(torch.device("cpu"), attention)
    made.quantization = quantization
    return made


def load(method: LinearMethod, weight: object, rows: Cut, columns: Cut, first: int = 0, padding: int = 0) -> None:
    method.loaders("layer", rows, columns, first, padding)["layer.weight"](weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["int8", "int4-g32", "fp8"])
@pytest.mark.parametrize("kind", [CpuDevice, Device])
@pytest.mark.parametrize("is_stored", [False, True])
def test_parts_and_padding(name: str, kind: type[Device], is_stored: bool) -> None:
    """Two parts and rows of zeros, quantized by the checkpoint or while loading; a device without kernels emulates."""
    scheme = scheme_named(name)
    weights = [torch.randn(40, 64), torch.randn(23, 64)]
    quantized = [quantize_rtn(weight_FE, scheme) for weight_FE in weights]
    method = device(Quantization(scheme, is_stored=is_stored), kind).linear_method(80, 64)
    for first, number, padding in ((40, 1, 17), (0, 0, 0)):
        source = quantized[number] if is_stored else OnDisk(weights[number])
        load(method, source, Cut.whole(len(weights[number])), Cut.whole(64), first, padding)
    method.finish()
    whole_FE = torch.cat([*(part.dequantized() for part in quantized), torch.zeros(17, 64)])
    x_TE = torch.randn(5, 64)
    torch.testing.assert_close(method.multiply(x_TE, None), x_TE @ whole_FE.T, rtol=0, atol=0.4)
    ids_T = torch.tensor([0, 62, 79])
    torch.testing.assert_close(method.read_rows(ids_T), whole_FE[ids_T], rtol=1e-3, atol=5e-3)


def test_a_layer_of_which_a_part_is_not_quantized_is_dequantized() -> None:
    plain, quantized = torch.randn(32, 64), quantize_rtn(torch.randn(32, 64), scheme_named("int8"))
    method = device(Quantization(scheme_named("int8"), is_stored=True)).linear_method(64, 64)
    load(method, OnDisk(plain), Cut.whole(32), Cut.whole(64))
    load(method, quantized, Cut.whole(32), Cut.whole(64), first=32)
    method.finish()
    x_TE = torch.randn(3, 64)
    torch.testing.assert_close(
        method.multiply(x_TE, None), x_TE @ torch.cat([plain, quantized.dequantized()]).T, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_take_their_columns_of_a_quantized_weight(size: int) -> None:
    """Whole groups, so the ranks' parts add up to what one rank computes."""
    quantized = quantize_rtn(torch.randn(48, 384), scheme_named("int4-g64"))
    x_TE, total_TF = torch.randn(4, 384), torch.zeros(4, 48)
    made = device(Quantization(scheme_named("int4-g64"), is_stored=True))
    whole = made.linear_method(48, 384)
    load(whole, quantized, Cut.whole(48), Cut.whole(384))
    for rank in range(size):
        columns = Cut(384, rank * 384 // size, 384 // size)
        method = made.linear_method(48, columns.count)
        load(method, quantized, Cut.whole(48), columns)
        total_TF += method.multiply(x_TE[:, columns.slice].contiguous(), None)
    torch.testing.assert_close(total_TF, whole.multiply(x_TE, None), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", [CpuDevice, Device])
def test_ranks_take_their_columns_of_a_weight_in_the_order_of_activations(
    tmp_path: Path, size: int, kind: type[Device]
) -> None:
    """Whose groups are in all ranks; a fused layer takes its inputs as they come. A head is dequantized."""
    layer = Layer(384, 48, 64, 4, symmetric=False, is_ordered=True)
    x_TE = torch.randn(4, 384)
    with open_checkpoint(save(tmp_path / "model", *gptq(layer))) as weights:
        source, made = weights[f"{LAYER}.weight"], device(Quantization(is_stored=True), kind)
        head, total_TF = made.linear_method(48, 384, is_head=True), torch.zeros(4, 48)
        load(head, source, Cut.whole(48), Cut.whole(384))
        for rank in range(size):
            columns = Cut(384, rank * 384 // size, 384 // size)
            method = made.linear_method(48, columns.count)
            load(method, source, Cut.whole(48), columns)
            method.finish()
            total_TF += method.multiply(x_TE[:, columns.slice].contiguous(), None)
    # Activations have 8 bits.
    torch.testing.assert_close(total_TF, x_TE @ layer.weight.T, rtol=0, atol=0.3 if kind is CpuDevice else 1e-3)
    ids_T = torch.tensor([0, 47])
    torch.testing.assert_close(head.read_rows(ids_T), layer.weight[ids_T], rtol=0, atol=1e-5)


def test_a_cut_within_a_group_is_refused() -> None:
    quantized = quantize_rtn(torch.randn(48, 384), scheme_named("int4-g64"))
    method = device(Quantization(scheme_named("int4-g64"), is_stored=True)).linear_method(48, 96)
    with pytest.raises(QuantizationError, match="divide among 1, 2, 3, 6 ranks"):
        load(method, quantized, Cut.whole(48), Cut(384, 96, 96))


@pytest.mark.parametrize(("name", "dtype"), [("int8", "float32"), ("int4-g32", "bfloat16"), ("fp8", "float32")])
def test_an_engine_with_quantized_layers(tmp_path: Path, name: str, dtype: str) -> None:
    """Its logits are about those of the plain model; fused layers give the same bits, and so does any batch."""
    checkpoints.save(tmp_path, families.FAMILIES["qwen 3"])
    plain = ModelRunner(checkpoints.engine_config(tmp_path, dtype=dtype))
    runner = ModelRunner(checkpoints.engine_config(tmp_path, dtype=dtype, quantization=name))
    ids = checkpoints.prompt(40, seed=1)
    together = checkpoints.logits(runner, ids, chunk=40)
    least = 0.6 if name == "int4-g32" else 0.9  # four bits are few for so small a model
    assert torch.nn.functional.cosine_similarity(together, checkpoints.logits(plain, ids, 40)).min() > least
    assert torch.equal(checkpoints.logits(runner, ids[:11], chunk=1), together[:11])
    runner.device.fused_rows = 0
    assert torch.equal(checkpoints.logits(runner, ids, chunk=40), together)


def test_plain_layers_of_a_quantized_checkpoint_keep_their_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused layers multiply by our kernels, which are not the fastest for many rows everywhere."""
    monkeypatch.setattr(linear, "choose_ways", lambda dtype: ("native", "native", "native", "plain"))
    checkpoints.save(tmp_path / "plain", families.FAMILIES["qwen 3"])
    QuantizationRun(tmp_path / "plain", tmp_path, Recipe(scheme_named("int8"), None)).run(lambda done, total: None)
    assert ModelRunner(checkpoints.engine_config(tmp_path)).device.fused_rows == sys.maxsize  # type: ignore[attr-defined]
    with safe_open(tmp_path / "plain" / "model.safetensors", framework="pt") as weights:
        name = "model.layers.1.mlp.down_proj"
        file = next(file for file in tmp_path.glob("*.safetensors") if f"{name}.weight_packed" in load_file(file))
        kept = {part: tensor for part, tensor in load_file(file).items() if not part.startswith(name)}
        save_file({**kept, f"{name}.weight": weights.get_tensor(f"{name}.weight")}, file)
    device = ModelRunner(checkpoints.engine_config(tmp_path)).device
    assert device.fused_rows == 128  # type: ignore[attr-defined]


def test_head_and_embedding_can_be_left() -> None:
    left = device(choose("int8", "keep", HERE))
    assert left.linear_method(64, 64, is_head=True).state_dict()  # a plain weight
    assert not left.linear_method(64, 64).state_dict()
    assert left.embedding_method(64, 64).state_dict()
    assert not device(choose("int8", "same", HERE)).embedding_method(64, 64).state_dict()
