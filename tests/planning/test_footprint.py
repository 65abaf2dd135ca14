"""planning/footprint.py against what the engine's own modules and pool allocate, and what transformers counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from helpers.checkpoints import engine_config, save
from helpers.families import FAMILIES
from helpers.interpreted import interpreted
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices.base import Device
from tidewright.devices.cpu.linear import CpuLinear
from tidewright.distributed.group import ALONE, TensorParallelGroup
from tidewright.engine.messages import EngineConfig
from tidewright.engine.model_runner import ModelRunner
from tidewright.layers.linear_method import PlainLinear
from tidewright.models.config import DecoderConfig
from tidewright.models.families import READERS, read_config
from tidewright.models.folder import read_json
from tidewright.models.registry import model_class
from tidewright.planning import footprint
from tidewright.planning.plan import possible_sizes
from tidewright.planning.weight_formats import SCHEMES, WeightFormat, WeightFormats, formats_of, stored_formats
from tidewright.quantization.affine import quantize_rtn, scheme_named
from tidewright.quantization.compressed_tensors_writer import quantization_config
from tidewright.quantization.input_order import by_group

with interpreted():
    from tidewright.devices.cuda.float8_weight import pack_float8
    from tidewright.devices.cuda.quantized_weight import pack

POSITIONS = 64
# Shapes as they are published, with the number of parameters that their own pages name.
PUBLISHED = {
    "Llama 3.1 8B": (
        hf.LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
        8_030_261_248,
    ),
    "Qwen 2.5 0.5B": (
        hf.Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        494_032_768,
    ),
}


def shapes(config: hf.PreTrainedConfig) -> tuple[dict[str, object], DecoderConfig]:
    words = {**config.to_dict(), "architectures": [_architecture(config)]}
    return words, read_config(words)


def _architecture(config: hf.PreTrainedConfig) -> str:
    return type(config).__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"


def tensors(module: nn.Module, parameters: bool) -> int:
    """Bytes of all parameters, or of all buffers; one that two layers share counts once."""
    found = module.parameters() if parameters else module.buffers()
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def rank_of(config: hf.PreTrainedConfig, group: TensorParallelGroup, dtype: torch.dtype) -> nn.Module:
    """The engine's own model, without memory behind its tensors."""
    words, model = shapes(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return model_class(words)(
                model, POSITIONS, group, Device(torch.device("meta"), ReferenceAttention(4, torch.device("meta")))
            )
    finally:
        torch.set_default_dtype(before)


def test_every_architecture_is_planned_here() -> None:
    assert {_architecture(config) for config in FAMILIES.values()} == set(READERS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_tables_of_every_rank_are_those_of_its_layers(name: str, dtype: torch.dtype) -> None:
    _, model = shapes(FAMILIES[name])
    for size in possible_sizes(model):
        ranks = [rank_of(FAMILIES[name], TensorParallelGroup(rank, size), dtype) for rank in range(size)]
        wanted = [tensors(rank, parameters=True) for rank in ranks]
        assert [footprint.weight_bytes(model, dtype.itemsize, rank, size) for rank in range(size)] == wanted
        assert wanted[footprint.largest_rank(model, dtype.itemsize, size)] == max(wanted)
        assert footprint.table_bytes(model, POSITIONS) == tensors(ranks[0], parameters=False)


@pytest.mark.parametrize("name", [*SCHEMES])
def test_a_quantized_weight_takes_what_the_gpu_packs_it_into(name: str) -> None:
    scheme = scheme_named(name)
    for features, depth in ((32, 64), (48, 272), (16, 1536), (32, 96)):
        weight = quantize_rtn(torch.randn(features, depth), scheme)
        made = (pack_float8 if scheme.is_float else pack)(weight, torch.device("cpu"))
        assert SCHEMES[name].bytes(depth, features) == made.nbytes, (features, depth)


@pytest.mark.parametrize("head", ["int8", "keep"])
@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_weights_of_every_rank_are_those_of_its_layers(name: str, head: str) -> None:
    _, model = shapes(FAMILIES[name])
    formats = formats_of("int4-g32", head, 2, None)
    for size in possible_sizes(model):
        for rank in range(size):
            made = rank_of(FAMILIES[name], TensorParallelGroup(rank, size), torch.bfloat16)
            heads = {id(layer.method) for layer in (made.head, made.embedding)}  # type: ignore[union-attr]
            methods = [module for module in made.modules() if isinstance(module, PlainLinear)]
            matrices = {id(method.weight): (method, id(method) in heads) for method in methods}
            plain = tensors(made, parameters=True) - sum(method.weight.nbytes for method, _ in matrices.values())
            quantized = sum(
                (formats.head if is_head else formats.layers).bytes(*reversed(method.weight.shape))
                for method, is_head in matrices.values()
            )
            assert footprint.weight_bytes(model, 2, rank, size, formats) == plain + quantized


def test_a_quantized_checkpoint_is_counted_as_its_config_says() -> None:
    def found(**quantization: object) -> WeightFormats | None:
        return stored_formats({"quantization_config": quantization}, 2)

    kept = WeightFormats.plain(2).head
    assert stored_formats({}, 2) is None
    assert found(quant_method="fp8") == WeightFormats(SCHEMES["fp8"], kept)
    assert found(quant_method="awq", bits=4, group_size=128) == WeightFormats(SCHEMES["int4-g128"], kept)
    gptq = found(quant_method="gptq", bits=4, group_size=128, sym=True)
    assert gptq == WeightFormats(WeightFormat(4, 128, block=64), kept)
    for name, head in (("w8a8", "int8"), ("int4-g32", "int8"), ("int4-g64", "int4-g64"), ("fp8", None)):
        config = quantization_config(scheme_named(name), scheme_named(head) if head else None, [])
        assert found(**config) == WeightFormats(SCHEMES[name], SCHEMES[head] if head else kept)
    assert formats_of("int4-g64", "keep", 2, gptq) == WeightFormats(SCHEMES["int4-g64"], kept)
    assert formats_of("auto", "int8", 2, gptq) == gptq
    assert formats_of("none", "int8", 2, gptq) == WeightFormats.plain(2)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 64), (8, 128), (4, 24)])
def test_parts_of_groups_in_the_order_of_activations_are_counted(bits: int, group: int, size: int) -> None:
    """As a rank of the engine cuts them, whose inputs are anywhere."""
    whole, features = 96 * 128, 16
    weights = WeightFormat(bits, group, has_offsets=True, block=64, is_ordered=True)
    groups_I = (torch.arange(whole) // group)[torch.randperm(whole, generator=torch.Generator().manual_seed(1))]
    order, found_G, part = by_group(groups_I[: whole // size], group, bits)
    columns = -(-len(order.inputs_E) // 64) * 64
    wanted = features * (columns * bits // 8 + len(found_G) * 4 + 4)
    assert len(order.inputs_E) == len(found_G) * part
    assert weights.bytes(whole // size, features, whole) == pytest.approx(wanted, rel=0.03)
    assert weights.bytes(whole, features, whole) == WeightFormat(bits, group, True, 64).bytes(whole, features)


def test_a_plan_of_ranks_counts_them() -> None:
    """Of the output and down projections alone, whose inputs ranks divide: about 6 bits a weight instead of 4.25."""
    model = shapes(PUBLISHED["Llama 3.1 8B"][0])[1]
    said = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False}
    plain, ordered = (
        stored_formats({"quantization_config": said | {"desc_act": desc_act}}, 2) for desc_act in (False, True)
    )
    assert footprint.weight_bytes(model, 2, formats=ordered) == footprint.weight_bytes(model, 2, formats=plain)
    more = footprint.weight_bytes(model, 2, 0, 2, ordered) - footprint.weight_bytes(model, 2, 0, 2, plain)
    cut = 32 * 4096 * (4096 + 14336) // 2
    assert 1.5 < 8 * more / cut < 2.2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_engine_has_allocated_so_much(tmp_path: Path, name: str) -> None:
    save(tmp_path, FAMILIES[name])
    runner = ModelRunner(engine_config(tmp_path, dtype="float16"))  # which no kernel rearranges
    model = read_config(read_json(tmp_path / "config.json"))
    assert footprint.weight_bytes(model, 2) == tensors(runner.model, parameters=True)
    assert footprint.table_bytes(model, runner.max_model_len) == tensors(runner.model, parameters=False)
    assert footprint.kv_block_bytes(model, 2, 4) * runner.num_blocks == runner.kv_cache.nbytes
    assert footprint.parameters(model) == hf.AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_quantized_cache_has_its_scales_counted(tmp_path: Path, kv_cache_dtype: str) -> None:
    save(tmp_path, FAMILIES["qwen 3"])
    runner = ModelRunner(engine_config(tmp_path, kv_cache_dtype=kv_cache_dtype))
    model = read_config(read_json(tmp_path / "config.json"))
    assert footprint.kv_block_bytes(model, 1, 4) * runner.num_blocks == runner.kv_cache.nbytes


def test_the_embedded_model_in_a_real_engine_has_so_much(model_dir: Path) -> None:
    """Weights that the kernels rearranged are counted where they are now, padding of theirs included."""
    runner = ModelRunner(EngineConfig(model_dir=str(model_dir), kv_cache_memory="64MiB"))
    model = read_config(read_json(model_dir / "config.json"))
    packed = {}
    for module in runner.model.modules():
        if isinstance(module, CpuLinear) and module.packed:
            packed[module.packed.values.data_ptr()] = module.packed.values.nbytes
    allocated = sum(packed.values()) + tensors(runner.model, parameters=True)
    assert footprint.weight_bytes(model, 2) == pytest.approx(allocated, rel=0.05)
    assert allocated > 250e6
    assert footprint.kv_block_bytes(model, 2, 16) * runner.num_blocks == runner.kv_cache.nbytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_are_published(name: str) -> None:
    config, wanted = PUBLISHED[name]
    assert footprint.parameters(shapes(config)[1]) == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_matrices_are_all_weights_with_two_dimensions_but_the_embedding(name: str) -> None:
    _, model = shapes(FAMILIES[name])
    made = rank_of(FAMILIES[name], ALONE, torch.bfloat16)
    head = {id(made.head.method.weight)}  # type: ignore[union-attr]
    matrices = [one for one in made.parameters() if one.dim() == 2]
    counted = [one for one in matrices if id(one) in head or one is not made.embedding.method.weight]  # type: ignore[union-attr]
    assert footprint.layer_values(model) + footprint.head_values(model) == sum(one.numel() for one in counted)
