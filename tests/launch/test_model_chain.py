"""The generated models of Triton, as Triton's own configuration format reads them."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from tidewright.launch.model_chain import write_chain
from tidewright.launch.server import _repositories

ROOT = Path(__file__).parent.parent.parent
ORIGINALS = {
    "tokenizer_a.b-1": "model_repository/tokenizer",
    "decoder_a.b-1": "model_repository/decoder",
    "generate_a.b-1": "ensemble/generate_direct",
}


def config(folder: Path) -> ModelConfig:
    found = ModelConfig()
    text_format.Parse((folder / "config.pbtxt").read_text(), found)
    return found


def test_a_chain_is_the_first_model_s_under_other_names(tmp_path: Path) -> None:
    write_chain("a.b-1", _repositories(), tmp_path)
    assert {folder.name for folder in tmp_path.iterdir()} == set(ORIGINALS)
    for name, original in ORIGINALS.items():
        made, expected = config(tmp_path / name), config(ROOT / original)
        assert made.name == name
        assert made.parameters["served_model"].string_value == "a.b-1"
        for step in made.ensemble_scheduling.step:
            assert step.model_name in ORIGINALS
            step.model_name = step.model_name.removesuffix("_a.b-1")
        made.name = expected.name
        del made.parameters["served_model"]
        assert made == expected
        code, expected_code = tmp_path / name / "1" / "model.py", ROOT / original / "1" / "model.py"
        assert (tmp_path / name / "1").is_dir()
        assert code.is_file() == expected_code.is_file()
        assert not code.is_file() or code.read_text() == expected_code.read_text()
