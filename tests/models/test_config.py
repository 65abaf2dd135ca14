"""models/config.py and the families' own reading: both ages of config.json, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.checkpoints import SIZES
from tidewright.models.config import DecoderConfig, LayerConfig, LinearScaling, Llama3Scaling, ModelConfigError, Rope
from tidewright.models.families import read_config
from tidewright.models.registry import model_class

GEMMA = SIZES | {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 7}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}


def read(architecture: str, config: dict[str, Any]) -> DecoderConfig:
    return read_config({"architectures": [architecture], **config})


def windows(config: DecoderConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 5000.0, "rope_scaling": SCALING},
        {"rope_parameters": {"rope_theta": 5000.0, **SCALING}},
        {"rope_theta": 5000, "rope_scaling": {"type": "llama3", **SCALING}, "rope_parameters": None},
    ],
)
def test_rope_of_either_age(written: dict[str, Any]) -> None:
    config = read("LlamaForCausalLM", SIZES | written)
    assert config.layers == (LayerConfig(Rope(5000.0, Llama3Scaling(8.0, 1.0, 4.0, 64))),) * 3


def test_rope_left_out() -> None:
    assert read("LlamaForCausalLM", SIZES).layers[0].rope == Rope(10000.0, None)


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 5e5, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
            }
        },
    ],
)
def test_gemma_3_turns_and_sees_differently_in_every_sixth_layer(written: dict[str, Any]) -> None:
    near, far = LayerConfig(Rope(2e4), 512), LayerConfig(Rope(5e5, LinearScaling(8.0)))
    config = read("Gemma3ForCausalLM", GEMMA | written | {"sliding_window": 512})
    assert config.layers == (near, near, near, near, near, far, near)
    assert config.qk_norm
    assert config.tied_embeddings
    assert (config.attention_softcap, config.logit_softcap) == (None, None)
    assert config.attention_scale == 1 / 16
    pattern = read("Gemma3ForCausalLM", GEMMA | written | {"sliding_window": 512, "sliding_window_pattern": 3})
    assert pattern.layers == (near, near, far, near, near, far, near)


def test_gemma_2_has_a_window_in_every_other_layer() -> None:
    config = read("Gemma2ForCausalLM", GEMMA | {"query_pre_attn_scalar": 144})
    assert windows(config) == [4096, None, 4096, None, 4096, None, 4096]
    assert (config.attention_softcap, config.logit_softcap, config.attention_scale) == (50.0, 30.0, 1 / 12)


@pytest.mark.parametrize(
    ("architecture", "written", "wanted"),
    [
        ("MistralForCausalLM", {"sliding_window": 9}, [9, 9, 9]),
        ("MistralForCausalLM", {}, [4096, 4096, 4096]),
        ("MistralForCausalLM", {"sliding_window": None}, [None, None, None]),
        ("Qwen2ForCausalLM", {"sliding_window": 9, "max_window_layers": 1}, [None, None, None]),
        ("Qwen2ForCausalLM", {"sliding_window": 9, "use_sliding_window": True}, [None, None, None]),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
            [None, 9, 9],
        ),
        (
            "Qwen2ForCausalLM",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 0,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            [9, None, None],
        ),
        ("LlamaForCausalLM", {"sliding_window": 9}, [None, None, None]),
    ],
)
def test_which_layers_have_a_window(architecture: str, written: dict[str, Any], wanted: list[int | None]) -> None:
    assert windows(read(architecture, SIZES | written)) == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "needs hidden_size"),
        ({"vocab_size": "many"}, "needs vocab_size"),
        ({"head_dim": 0}, "needs head_dim"),
        ({"vocab_size": 2**31}, "needs vocab_size as a whole number from 1 to 2147483647, not 2147483648"),
        ({"num_hidden_layers": 10**9}, "needs num_hidden_layers as a whole number from 1 to 10000"),
        ({"num_attention_heads": 10**9}, "needs num_attention_heads as a whole number from 1 to 10000"),
        ({"num_key_value_heads": "9" * 10**6}, "needs num_key_value_heads as .* 10000, not '9{98}$"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) is not a multiple of num_key_value_heads \(4\)"),
        ({"quantization_config": {"bits": 4}}, "quant_method 'missing', which is not supported; there is awq"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "a scale per block"),
        ({"vision_config": {"depth": 2}}, "vision_config"),
        ({"num_experts": 8}, "num_experts"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"dual_chunk_attention_config": {"chunk_size": 1}}, "dual_chunk_attention_config"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "RoPE scaling .*'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE scaling .*'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "linear RoPE scaling .* lacks 'factor'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
        ({"layer_types": ["full_attention", "full_attention", "linear_attention"]}, "layer_types has 'linear_att"),
        ({"layer_types": ["sliding_attention"] * 3}, "needs sliding_window"),
    ],
)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_configs_that_are_refused(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        read(architecture, SIZES | changes)


@pytest.mark.parametrize("architectures", [None, [], ["GPT2LMHeadModel"]])
def test_unknown_architecture_is_told_what_there_is(architectures: list[str] | None) -> None:
    with pytest.raises(ModelConfigError, match=r"there is: Gemma2ForCausalLM, .*LlamaForCausalLM, Mistral"):
        model_class({"architectures": architectures})
