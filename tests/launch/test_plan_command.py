"""`tidewright plan`: what it prints, for whom it works, and what it says of bad input."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from helpers.checkpoints import SIZES
from helpers.model_shapes import LLAMA_8B_JSON
from tidewright.config import Settings
from tidewright.launch.cli import main
from tidewright.planning.gpus import GB, GPUS, TFLOPS

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "sizing.md"

# In an interpreter that has no torch and no numpy; both are imported by most of the engine.
WITHOUT_TORCH = """
import sys
class No:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy", "safetensors", "transformers", "huggingface_hub"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, No())
from tidewright.launch.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "model", LLAMA_8B_JSON)


def written(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(*words: object) -> str:
    # Else as wide as pytest-xdist says that the terminal is.
    result = CliRunner().invoke(main, ["plan", *map(str, words)], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.output


def planned(*words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "--json"))
    return found


def refusal(*words: object) -> str:
    result = CliRunner().invoke(main, ["plan", *map(str, words)])
    assert result.exit_code != 0
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_json_says_what_llama_8b_needs(folder: Path) -> None:
    found = planned("--model", folder, "--gpu", "H200", "--context", 8192, "--concurrent", 200)
    assert found["model"]["parameters"] == 8_030_261_248
    assert found["per_gpu"]["kv_bytes_per_sequence"] == 2**30
    assert (found["replicas"], found["gpus"], found["sequences_per_replica"]) == (2, 2, 100)
    assert found["tensor_parallel_sizes"] == [1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
    assert found["roofline_estimate"]["is_measured"] is False
    assert found["gpu"]["source"] == "NVIDIA H200 (SXM) data sheet"


def test_an_fp8_checkpoint_takes_16_bits_where_the_card_dequantizes_it(tmp_path: Path) -> None:
    model = written(tmp_path / "model", {**LLAMA_8B_JSON, "quantization_config": {"quant_method": "fp8"}})
    plain = written(tmp_path / "plain", LLAMA_8B_JSON)

    def weights(folder: Path, card: str) -> int:
        return planned("--model", folder, "--gpu", card, "--context", 512)["per_gpu"]["weight_bytes"]

    assert weights(model, "A10") == weights(plain, "A10") > 1.5 * weights(model, "L4")
    said = " ".join(run("--model", model, "--gpu", "A10", "--context", 512).split())
    assert "the A10 does not multiply fp8, so they take 16 bits" in said


def test_a_config_file_a_folder_and_a_prepared_model_are_alike(folder: Path, model_dir: Path) -> None:
    words = ("--gpu", "L4", "--context", 1024)
    of_folder, of_file = (planned("--model", one, *words) for one in (folder, folder / "config.json"))
    assert of_folder["per_gpu"] == of_file["per_gpu"]
    by_name, by_folder = (planned(*model, *words) for model in ((), ("--model", model_dir)))
    assert by_name["per_gpu"] == by_folder["per_gpu"]
    assert by_name["model"]["config"] == str(model_dir / "config.json")


def test_a_hub_model_that_is_on_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def on_disk(name: str, file: str, revision: str | None) -> str | None:
        asked.append((name, file, revision))
        return str(folder / "config.json") if name == "org/model" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", on_disk)
    assert planned("--model", "org/model", "--gpu", "H200", "--context", 100)["model"]["layers"] == 32
    planned("--model", "org/model@4f2c1d9", "--gpu", "H200", "--context", 100)
    assert asked == [("org/model", "config.json", None), ("org/model", "config.json", "4f2c1d9")]
    assert "org/other is not on this disk; run: tidewright prepare org/other" in refusal(
        "--model", "org/other", "--gpu", "L4"
    )


def test_flags_are_those_of_serve(folder: Path) -> None:
    found = planned(
        *("--model", folder, "--gpu", "L4", "--context", 4096, "--concurrent", 20, "--dtype", "float16"),
        *("--tensor-parallel-size", 8, "--gpus-per-node", 4, "--block-size", 32, "--max-batched-tokens", 1024),
    )
    flags = found["serve"]["flags"]
    assert Settings(**{name.replace("-", "_"): value for name, value in flags.items()}).nodes == 2
    words = shlex.split(found["serve"]["command"])
    assert words[:2] == ["tidewright", "serve"]
    assert dict(zip(words[2::2], words[3::2], strict=True)) == {f"--{name}": value for name, value in flags.items()}
    assert {"--dtype", "--block-size", "--max-batched-tokens", "--rendezvous"} < set(words)


def test_the_table_has_the_figures_and_says_what_is_estimated(folder: Path) -> None:
    words = ("--model", folder, "--gpu", "H200", "--context", 8192, "--concurrent", 200)
    text = run(*words, "--prompt-tokens", 1000, "--output-tokens", 200)
    for expected in (
        "8.03 billion parameters in bfloat16; 32 layers, 32 query and 8 KV heads of 128",
        "weights 14.96 GiB",
        "KV cache per token 128.0 KiB",
        "tensor-parallel size 1 of 1, 2, 3, 4, 5, 6, 7, 8, 16, 32 that work",
        "upper bound that is estimated nothing here was measured",
        "with 1000 tokens in and 200 out",
        "NVIDIA H200 (SXM) data sheet",
        f"tidewright serve --model {folder} --max-model-len 8192 --max-running 200",
    ):
        assert expected in " ".join(text.split())
    assert "[" not in text.replace(str(folder), "")  # markup that was not read


def test_a_gpu_that_is_only_described(folder: Path) -> None:
    words = ("--model", folder, "--context", 1000, "--gpu-memory", "96GiB")
    found = planned(*words)
    assert (found["gpu"]["memory_bytes"], found["roofline_estimate"]) == (96 * 2**30, None)
    assert "not estimated: give --bandwidth and --tflops" in run(*words)
    fast = planned(*words, "--gpu", "MI300", "--bandwidth", 1000, "--tflops", 500)
    assert fast["gpu"]["name"] == "MI300"
    assert fast["roofline_estimate"]["prompt_tokens_per_second"] == pytest.approx(
        500e12 / 2 / (7_504_920_576 - 4096 * 128256), rel=1e-3
    )


def test_what_is_given_goes_before_the_data_sheet(folder: Path) -> None:
    found = planned("--model", folder, "--context", 1000, "--gpu", "H200", "--gpu-memory", "139GiB")
    assert found["gpu"] == {
        "name": "H200",
        "memory_bytes": 139 * 2**30,
        "source": "as given; else NVIDIA H200 (SXM) data sheet",
    }


@pytest.mark.parametrize("as_machine", [False, True])
def test_it_needs_no_torch(folder: Path, as_machine: bool) -> None:
    words = ["plan", "--model", str(folder), "--gpu", "H200", *(["--json"] if as_machine else [])]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "H200" in done.stdout


def test_the_limit_of_the_model_is_its_default_context(folder: Path) -> None:
    assert planned("--model", folder, "--gpu", "H200")["load"] == {
        "context": 131072,
        "concurrent": 1,
        "mean_tokens": 131072,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), f"say which GPU: --gpu with one of {', '.join(GPUS)}, or --gpu-memory"),
        (("--gpu", "H300"), f"GPU 'H300' is not known: --gpu with one of {', '.join(GPUS)}, or --gpu-memory"),
        (("--gpu", "H200", "--context", "0"), "0 is not in the range"),
        (("--gpu", "H200", "--context", "131073"), "the context is 131073, but the model's limit is 131072 tokens"),
        (("--gpu", "H200", "--concurrent", "-1"), "-1 is not in the range"),
        (("--gpu", "H200", "--concurrent", "1000001"), "1000001 is not in the range"),
        (("--gpu", "H200", "--prompt-tokens", "10"), "--prompt-tokens and --output-tokens go together"),
        (("--gpu", "H200", "--tensor-parallel-size", "12"), "these do: 1, 2, 3, 4, 5, 6, 7, 8, 16, 32"),
        (("--gpu", "H200", "--headroom", "91"), "91 is not in the range"),
        (("--gpu", "T4"), "the T4 does not compute in bfloat16; choose float16 or float32"),
        (
            ("--gpu", "T4", "--dtype", "float16", "--tensor-parallel-size", "1"),
            "the model does not fit: at tensor",
        ),
        (("--gpu-memory", "80%"), "'80%' is a share; write an amount"),
        (("--gpu-memory", "80 apples"), "'80 apples' is not an amount of memory"),
        (("--gpu-memory", "1MiB"), "it must be 1GiB to 16384GiB"),
        (("--gpu-memory", "1e99GiB"), "is not an amount of memory"),
        (("--gpu", "H200", "--bandwidth", "nan"), "is not"),
        (("--gpu", "H200", "--tflops", "inf"), "is not in the range"),
    ],
)
def test_bad_options(folder: Path, words: tuple[str, ...], message: str) -> None:
    assert message in refusal("--model", folder, *words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}, "mixtures of experts are not supported"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128}, "mixtures of experts are not supported"),
        ({"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256}, "mixtures of experts are not supp"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported; there is: Gemma2"),
        ({"architectures": 7}, "architecture 7 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quant_method 'missing', which is not supported"),
        ({"num_hidden_layers": 0}, "needs num_hidden_layers as a whole number from 1"),
        ({"hidden_size": "large"}, "needs hidden_size as a whole number from 1"),
    ],
)
def test_models_that_are_not_served(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = {"architectures": ["LlamaForCausalLM"], **SIZES, **changes}
    assert message in refusal("--model", written(tmp_path / "it", config), "--gpu", "H200")


def test_models_that_are_not_there(tmp_path: Path) -> None:
    assert "there is no file or folder 'nothing'" in refusal("--model", "nothing", "--gpu", "H200")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refusal("--model", tmp_path / "empty", "--gpu", "H200")
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json can't be read" in refusal("--model", tmp_path / "broken.json", "--gpu", "H200")
    (tmp_path / "list.json").write_text("[]")
    assert "does not hold a JSON object" in refusal("--model", tmp_path / "list.json", "--gpu", "H200")
    (tmp_path / "large.json").write_text(" " * (1 << 20) + "{}")
    assert "larger than 1 MiB" in refusal("--model", tmp_path / "large.json", "--gpu", "H200")
    (tmp_path / "model.gguf").write_text("")
    assert "is not prepared; run: tidewright prepare" in refusal("--model", tmp_path / "model.gguf", "--gpu", "H200")


def test_the_document_shows_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = DOCUMENT.read_text()
    command, shown = re.findall(r"```(?:bash)?\n(.*?)\n```", text, re.DOTALL)[:2]
    written(tmp_path / "llama-3.1-8b", LLAMA_8B_JSON)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    words = shlex.split(command)
    assert words[:2] == ["tidewright", "plan"]
    assert run(*words[2:]).rstrip() == shown


def test_the_document_has_the_table_of_gpus_and_all_fields(folder: Path) -> None:
    text = DOCUMENT.read_text()
    row = r"^\| ([A-Z][\w-]+) \| (\d+) \| (\d+) \| ([\d.]+)( \(float16 only\))? \| ([\d.]+) \| (.+) \|$"
    rows = re.findall(row, text, re.M)
    assert rows == [
        (
            *(gpu.name, str(gpu.memory // GB), f"{(gpu.bandwidth or 0) / GB:g}", f"{(gpu.flops_16 or 0) / TFLOPS:g}"),
            *("" if gpu.has_bfloat16 else " (float16 only)", f"{(gpu.flops_32 or 0) / TFLOPS:g}", gpu.source),
        )
        for gpu in GPUS.values()
    ]
    fields = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.+?) \|", text, re.M)))
    assert set(planned("--model", folder, "--gpu", "H200")) == set(fields)


def test_stored_weights_are_planned_as_auto_does_and_refused_where_none_are_named(folder: Path, tmp_path: Path) -> None:
    words = ("--gpu", "H100", "--json", "--context", "8192")
    assert "says nothing of quantized weights" in refusal("--model", folder, "--quantization", "stored", *words)
    model = written(tmp_path / "fp8", {**LLAMA_8B_JSON, "quantization_config": {"quant_method": "fp8"}})
    auto, stored = (
        planned("--model", model, "--quantization", one, *words[:2], *words[3:]) for one in ("auto", "stored")
    )
    assert stored["per_gpu"] == auto["per_gpu"]


def test_a_file_that_is_no_config_is_not_to_be_prepared(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A model")
    said = refusal("--model", tmp_path / "README.md", "--gpu", "H100")
    assert "README.md is no config.json; give one, or a model's folder or name" in said
