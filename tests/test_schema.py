"""The config.pbtxt files say what schema.py says."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tidewright import schema
from tidewright.failsafe.metrics import FALLBACK_REASONS

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    "model_repository/tokenizer": (schema.TOKENIZER_INPUTS, schema.TOKENIZER_OUTPUTS),
    "model_repository/decoder": (schema.DECODER_INPUTS, schema.DECODER_OUTPUTS),
    "model_repository/fallback": (schema.FALLBACK_INPUTS, schema.GENERATION_OUTPUTS),
    "ensemble/failsafe": (schema.FAILSAFE_INPUTS, schema.FAILSAFE_OUTPUTS),
    "ensemble/generate": (schema.GENERATE_INPUTS, schema.FAILSAFE_OUTPUTS),
    "ensemble/generate_direct": (schema.GENERATE_INPUTS, schema.GENERATION_OUTPUTS),
}


def read_config(folder: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse((ROOT / folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.mark.parametrize("folder", CONFIGS)
def test_config_pbtxt_has_exactly_the_tensors_of_the_schema(folder: str) -> None:
    config = read_config(folder)
    inputs, outputs = CONFIGS[folder]

    def data_type(value: int) -> str:
        return model_config_pb2.DataType.Name(value)

    found = [schema.TensorSpec(t.name, data_type(t.data_type), tuple(t.dims), t.optional) for t in config.input]
    assert found == list(inputs)
    assert [schema.TensorSpec(t.name, data_type(t.data_type), tuple(t.dims)) for t in config.output] == list(outputs)


@pytest.mark.parametrize(
    ("ensemble", "last", "prompt", "outputs"),
    [
        ("generate", "failsafe", {"input_ids", "text_input", "messages"}, schema.FAILSAFE_OUTPUTS),
        ("generate_direct", "decoder", {"input_ids"}, schema.GENERATION_OUTPUTS),
    ],
)
def test_the_ensembles_pass_every_tensor_on(
    ensemble: str, last: str, prompt: set[str], outputs: tuple[schema.TensorSpec, ...]
) -> None:
    steps = {step.model_name: step for step in read_config(f"ensemble/{ensemble}").ensemble_scheduling.step}
    assert set(steps["tokenizer"].input_map) == {t.name for t in schema.TOKENIZER_INPUTS}
    assert set(steps[last].input_map) == {*prompt, *(t.name for t in schema.GENERATION_OPTIONS)}
    assert set(steps[last].output_map) == {t.name for t in outputs}
    for step in steps.values():
        assert all(key == value for mapping in (step.input_map, step.output_map) for key, value in mapping.items())


def test_every_model_that_streams_is_decoupled() -> None:
    for folder in CONFIGS.keys() - {"model_repository/tokenizer"}:
        assert read_config(folder).model_transaction_policy.decoupled


def test_the_docs_name_all_of_it() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    tensors = {tensor.name for inputs, outputs in CONFIGS.values() for tensor in (*inputs, *outputs)}
    models = {Path(folder).name for folder in CONFIGS}
    sampling, status = schema.SamplingParams.__struct_fields__, schema.DecoderStatus.__struct_fields__
    reasons = set(schema.FINISH_REASONS) | set(FALLBACK_REASONS)
    for name in (*tensors, *models, *sampling, *status, *schema.CONTROL_WORDS, schema.CANCEL, *reasons):
        assert f"`{name}`" in page, name
