"""devices/cuda/quantized_linear.py: loading, and the engine's steps with each scheme, with interpreted kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from helpers.checkpoints import SIZES, engine_config, greedy, logits, prompt, save
from helpers.counted_memory import CountedMemory
from helpers.interpreted import interpreted
from helpers.on_disk import OnDisk
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.base import Device, DeviceError
from tidewright.devices.cpu.memory import CpuMemory
from tidewright.devices.cuda.launch import Launch
from tidewright.distributed.sharding import Cut
from tidewright.engine import model_runner
from tidewright.engine.model_runner import ModelRunner
from tidewright.layers.linear_method import LinearMethod, PlainLinear
from tidewright.quantization.affine import AffineWeight, Scheme, quantize_rtn, scheme_named
from tidewright.quantization.choice import Quantization
from tidewright.quantization.input_order import InputOrder
from tidewright.quantization.quantize_model import QuantizationRun, Recipe

with interpreted():
    from tidewright.devices.cuda import quantized_linear, quantized_weight
    from tidewright.devices.cuda.device import CudaDevice
    from tidewright.devices.cuda.quantized_weight import quantize_tokens

CPU = torch.device("cpu")
STORED = Quantization(is_stored=True)


@pytest.fixture
def has_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has the scaled product on CPUs, too."""
    monkeypatch.setattr(quantized_linear, "multiplies_float8", lambda device: True)


def method_of(
    parts: list[AffineWeight | torch.Tensor], quantization: Quantization = STORED, padding: int = 0
) -> LinearMethod:
    device = CudaDevice(CPU, CpuMemory())
    device.quantization = quantization
    sizes = [list(part.shape if isinstance(part, torch.Tensor) else part.codes_FE.shape) for part in parts]
    depth, total = sizes[0][1], sum(size[0] for size in sizes)
    method, first = device.linear_method(total + padding, depth), 0
    for part, (rows, _) in zip(parts, sizes, strict=True):
        source = OnDisk(part) if isinstance(part, torch.Tensor) else part
        last = padding if first + rows == total else 0
        loader = method.loaders("layer", Cut.whole(rows), Cut.whole(depth), first, last)["layer.weight"]
        loader(source)  # type: ignore[arg-type]
        first += rows
    method.finish()
    return method


def assert_multiplies_by(method: LinearMethod, weight_FE: torch.Tensor, tolerance: float = 1e-4) -> None:
    features, depth = weight_FE.shape
    x_TE, bias_F = torch.randn(3, depth), torch.randn(features)
    for bias in (None, bias_F):
        wanted = F.linear(x_TE, weight_FE, bias)
        torch.testing.assert_close(method.multiply(x_TE, bias), wanted, rtol=tolerance, atol=depth * tolerance)
    ids_T = torch.tensor([features - 1, 0, features // 2])
    torch.testing.assert_close(method.read_rows(ids_T), weight_FE[ids_T], rtol=1e-3, atol=3e-3)


def test_parts_of_several_formats_and_padding() -> None:
    """As q, k and v of a GGUF file are; the first two become one weight."""
    four, six = Scheme("", 4, 32, symmetric=False), Scheme("", 8, 16)
    schemes = (four, four, six, scheme_named("int8"))
    parts = [quantize_rtn(torch.randn(size, 64), one) for size, one in zip((9, 4, 7, 5), schemes, strict=True)]
    whole_FE = torch.cat([*(part.dequantized() for part in parts), torch.zeros(6, 64)])
    assert_multiplies_by(method_of(list(parts), padding=6), whole_FE, 1e-3)


def test_columns_in_another_order_than_the_inputs() -> None:
    """-1 is no input; two weights share an order, the third has its own."""
    orders = [torch.randperm(64), torch.where(torch.arange(64) < 40, torch.arange(64), -1)]
    parts = [
        replace(quantize_rtn(torch.randn(size, 64), scheme_named("int4-g32")), order=InputOrder(order, count))
        for size, order, count in ((9, orders[0], 64), (4, orders[0], 64), (7, orders[1], 64))
    ]
    method = method_of(list(parts))
    assert len(method._weights) == 2  # type: ignore[attr-defined]
    x_TE = torch.randn(3, 64)
    wanted = F.linear(x_TE, torch.cat([part.dequantized() for part in parts]))
    torch.testing.assert_close(method.multiply(x_TE, None), wanted, rtol=1e-3, atol=0.06)


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", Scheme("", 4, 128), "fp8"])
def test_what_a_weight_will_take_is_known_before(scheme: str | Scheme) -> None:
    """Up to a factor of four bytes for each output. Without products of float8, it is that of the dequantized one."""
    chosen = Quantization(scheme_named(scheme) if isinstance(scheme, str) else scheme, is_stored=True)
    device = CudaDevice(CPU, CpuMemory())
    device.quantization = chosen
    before = device.linear_method(40, 256).pending_bytes
    method = method_of([quantize_rtn(torch.randn(40, 256), chosen.scheme)], chosen)  # type: ignore[arg-type]
    assert method.pending_bytes == 0
    taken = sum(weight.nbytes - 4 * 40 for weight in method._weights) + sum(p.nbytes for p in method.parameters())
    assert before == taken


def test_a_device_too_small_for_quantized_weights_says_the_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    monkeypatch.setattr(model_runner, "PATIENCE", 0.0)
    monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: CudaDevice(CPU, CountedMemory(50_000)))
    with pytest.raises(DeviceError, match=r"the weights take 0\.1 MiB, but cpu has 0\.0 MiB free"):
        ModelRunner(engine_config(tmp_path, quantization="int8"))


@pytest.mark.usefixtures("has_float8")
def test_float8() -> None:
    parts = [quantize_rtn(torch.randn(size, 64), scheme_named("fp8")) for size in (32, 16)]
    whole_FE = torch.cat([part.dequantized() for part in parts])
    assert_multiplies_by(method_of(list(parts)), whole_FE, 0.02)  # tokens have 4 bits, and the sign


def test_what_has_no_product_is_dequantized_and_the_log_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    quantized_linear._warn_once.cache_clear()
    float8, odd = (
        quantize_rtn(torch.randn(16, 64), scheme_named("fp8")),
        quantize_rtn(torch.randn(16, 64), Scheme("", 8, 24)),
    )
    plain = torch.randn(8, 64)
    for _ in range(2):
        assert_multiplies_by(method_of([float8]), float8.dequantized())
        assert_multiplies_by(method_of([odd]), odd.dequantized())
        assert_multiplies_by(method_of([float8, plain]), torch.cat([float8.dequantized(), plain]))
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "float8 needs a GPU of compute capability 8.9 (Ada, Hopper) or later; int8 does not",
        "no kernel takes groups of 24 inputs; multiples of 16 would do",
    ]


@pytest.mark.usefixtures("has_float8")
def test_products_of_float8_that_torch_refuses_are_not_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    quantized_linear._warn_once.cache_clear()
    in_groups = quantize_rtn(torch.randn(16, 64), Scheme("", 8, 32, is_float=True))
    odd = quantize_rtn(torch.randn(16, 72), scheme_named("fp8"))
    for weight in (in_groups, odd):
        assert_multiplies_by(method_of([weight]), weight.dequantized())
    assert "a scale per tensor or channel, and sizes that 16 divides" in caplog.text


@pytest.mark.parametrize("name", ["int4-g32", "w8a8"])
def test_kernels_for_all_numbers_of_rows_are_compiled_before_the_first_request(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: set[frozenset[tuple[str, int]]] = set()

    def start(kernel: object, grid: object, launch: Launch, *arguments: object) -> None:
        made.add(frozenset(launch.constants.items()))

    monkeypatch.setattr(quantized_weight, "start", start)
    weight = quantize_rtn(torch.randn(40, 64), scheme_named(name))
    method = method_of([weight], Quantization(scheme_named(name), is_stored=True))
    assert not made  # interpreted kernels are not compiled
    method._compiles = True
    method.finish()
    before = set(made)
    for rows in range(1, 300):
        method.multiply(torch.zeros(rows, 64), None)
    assert made == before


def quantized_in_torch(largest: float, round_to: Callable[[torch.Tensor], torch.Tensor]) -> type[PlainLinear]:
    class Emulated(PlainLinear):
        """With a scale per token, and results of float8 in bfloat16."""

        def multiply(self, x_TE: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
            scale_T1 = x_TE.abs().amax(1, keepdim=True) / largest
            out_TF = F.linear(round_to(x_TE / scale_T1) * scale_T1, self.weight, bias_F)
            return out_TF.bfloat16().float() if largest == 448 else out_TF

    return Emulated


def test_a_checkpoint_of_w8a8_is_computed_in_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As config.json says. The head's tokens are not quantized."""
    original, folder = tmp_path / "original", tmp_path / "quantized"
    folder.mkdir()
    save(original, transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1}, tie_word_embeddings=False))
    QuantizationRun(original, folder, Recipe(scheme_named("w8a8"), scheme_named("int8"))).run(lambda done, total: None)
    monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: CudaDevice(CPU, CpuMemory()))
    model = ModelRunner(engine_config(folder, block_size=16)).model
    x_TE = torch.randn(3, 48)
    for layer, is_quantized in ((model.layers[0].attention.qkv, True), (model.head, False)):
        (weight,) = layer.method._weights
        in_integers = weight.multiply_quantized(quantize_tokens(x_TE), None, torch.empty(3, weight.features))
        assert torch.equal(layer.multiply(x_TE), in_integers) == is_quantized


EMULATED = {
    "w8a8": quantized_in_torch(127, torch.round),
    "fp8": quantized_in_torch(448, lambda x: x.to(torch.float8_e4m3fn).float()),
}


@pytest.mark.parametrize("name", ["int8", "w8a8", "int4-g32", "fp8"])
@pytest.mark.usefixtures("has_float8")
def test_steps_say_what_dequantized_weights_say(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, by torch, on the CPU. A tied head, prompts in chunks, several at once, mixed with decodes."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    save(tmp_path, transformers.LlamaConfig(**SIZES | sizes, tie_word_embeddings=True))

    class Reference(Device):
        def linear_method(self, out_features: int, in_features: int, is_head: bool = False) -> LinearMethod:
            emulated = PlainLinear if is_head and name == "w8a8" else EMULATED.get(name, PlainLinear)
            return emulated(out_features, in_features, self.quantization.scheme_of(is_head))

    def runner(device: Device) -> ModelRunner:
        monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: device)
        return ModelRunner(engine_config(tmp_path, block_size=16, quantization=name, quantize_head="same"))

    found, wanted = (
        runner(CudaDevice(CPU, CpuMemory())),
        runner(Reference(CPU, ReferenceAttention(16, CPU), CpuMemory())),
    )
    assert not list(found.model.head.parameters())  # type: ignore[union-attr]
    ids = prompt(12, seed=1)
    # Scales of groups have 11 bits, and a value between two codes may round otherwise.
    tolerance = 0.05 if name == "fp8" else 0.02
    torch.testing.assert_close(logits(found, ids, 12), logits(wanted, ids, 12), rtol=tolerance, atol=tolerance)
    prompts = [prompt(length, seed=length) for length in (5, 12)]
    assert greedy(found, prompts, 2, chunk=8) == greedy(wanted, prompts, 2, chunk=8)
