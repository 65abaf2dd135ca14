"""`tidewright quantize`: what it makes, what it says of wrong inputs, and what an interruption leaves."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import transformers as hf
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers.checkpoints import SIZES, VOCAB, engine_config, greedy, prompt
from helpers.checkpoints import save as save_model
from helpers.own_cache import use_own_cache
from helpers.small_disk import run_on_small_disk
from tidewright.cache import find_prepared
from tidewright.engine.model_runner import ModelRunner
from tidewright.launch import quantize as quantize_module
from tidewright.launch import space
from tidewright.launch.cli import main
from tidewright.quantization import report as report_module
from tidewright.quantization.quality import Quality
from tidewright.quantization.quantize_model import QuantizationRun
from tidewright.quantization.report import Report

WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a model")
    save_model(folder, hf.LlamaConfig(**WIDE, tie_word_embeddings=True))
    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_own_cache(tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, words)])


def refused(*words: object) -> str:
    result = run(*words)
    assert result.exit_code in (1, 2), result.output
    assert not isinstance(result.exception, Exception), result.exception  # SystemExit is none
    return " ".join(result.output.split())


def test_what_it_makes_is_served_and_made_once(model: Path, cache: Path) -> None:
    result = run(model, "--scheme", "int4-g32")
    assert result.exit_code == 0, result.output
    assert result.stderr.split()[-2:] == ["100", "%"]
    folder = Path(result.stdout.strip())
    assert folder.parent == cache / "quantized"
    assert find_prepared(str(folder)) == folder
    assert {file.name for file in folder.iterdir()} >= {"config.json", "tokenizer.json", "generation_config.json"}
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in folder.iterdir())
    ids = prompt(12, 3)
    (answer,) = greedy(ModelRunner(engine_config(folder)), [ids], 8, 12)
    assert len(answer) == 8
    made = (folder / "config.json").stat().st_ino
    assert run(model, "--scheme", "int4-g32").stdout == result.stdout
    assert (folder / "config.json").stat().st_ino == made
    run(model, "--scheme", "int4-g32", "--force")
    assert (folder / "config.json").stat().st_ino != made
    # Another head is another model.
    made = (folder / "config.json").stat().st_ino
    run(model, "--scheme", "int4-g32", "--head", "keep", "--force")
    assert (folder / "config.json").stat().st_ino != made


def test_another_quantized_model_is_replaced_only_by_force(model: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert run(model, "--out", made).exit_code == 0
    before = (made / "config.json").stat().st_ino
    for words in (("--scheme", "int4-g32"), ("--head", "keep"), ("--scheme", "w8a8")):
        said = refused(model, "--out", made, *words)
        assert f"made holds {model} in int8 by rtn, head int8; --force replaces it, or choose another --out" in said
    assert (made / "config.json").stat().st_ino == before
    assert run(model, "--out", made, "--scheme", "int4-g32", "--force").exit_code == 0
    assert (made / "config.json").stat().st_ino != before


def test_gptq_reads_the_text_that_it_is_given(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(" ".join(f"w{number}" for number in prompt(300, 1)))
    made = []
    for words in ((), ("--method", "gptq", "--calibration", text)):
        result = run(model, "--scheme", "int4-g32", "--out", tmp_path / f"made-{len(made)}", *words)
        assert result.exit_code == 0, result.output
        made.append((Path(result.stdout.strip()) / "model-00001-of-00004.safetensors").read_bytes())
    assert made[0] != made[1]
    text.write_text("w1 w2 w3")
    said = refused(model, "--scheme", "int4-g32", "--out", tmp_path / "made-1", *words)
    assert "in int4-g32 by gptq, head int8, with another calibration text; --force replaces it" in said


def test_a_report_is_printed_and_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality = Quality(**{**dict.fromkeys(Quality.__struct_fields__, 1.0), "tokens": 20_000, "perplexity": 1.03})
    asked = []

    def make_reports(source: Path, folders: dict[str, Path], *rest: object) -> dict[str, Report]:
        asked.append((source, folders))
        sizes = {"bytes": 5_000_000, "source_bytes": 10_000_000, "load_seconds": 1.0, "source_load_seconds": 2.0}
        return {"int8": Report(scheme="int8", dtype="bfloat16", **sizes, quality=quality)}

    monkeypatch.setattr(report_module, "make_reports", make_reports)
    result = run(model, "--out", tmp_path / "made", "--report")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "made")
    ((source, folders),) = asked
    assert (source, folders) == (find_prepared(str(model)), {"int8": tmp_path / "made"})
    printed = [line.split() for line in result.stderr.splitlines()]
    assert ["weights", "10", "MB", "5", "MB"] in printed
    assert ["perplexity", "1.00", "1.03"] in printed
    assert ["+3.0%"] in printed
    assert msgspec.json.decode((tmp_path / "made" / "report.json").read_bytes(), type=Report).quality == quality


def test_wrong_orders(model: Path, tmp_path: Path) -> None:
    assert "'int3' is not one of 'int8', 'w8a8'" in refused(model, "--scheme", "int3")
    assert "GPTQ is for integers" in refused(model, "--scheme", "fp8", "--method", "gptq")
    assert "--calibration is for --method gptq" in refused(model, "--calibration", model / "tokenizer.json")
    gptq = (model, "--scheme", "int4-g32", "--method", "gptq", "--calibration")
    assert "can't read the calibration text" in refused(*gptq, tmp_path / "missing")
    (tmp_path / "empty").write_text(" \n")
    assert "is empty" in refused(*gptq, tmp_path / "empty")
    (tmp_path / "one").write_text("w1")
    assert "has no two tokens" in refused(*gptq, tmp_path / "one")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "can't read the calibration text" in refused(*gptq, tmp_path / "bytes")
    assert "there is no file or folder 'no-such-model'" in refused("no-such-model")
    assert "groups of 128 don't divide" in refused(model, "--scheme", "int4-g128")


def test_a_folder_of_something_else_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        assert "is not a quantized model; remove it" in refused(model, "--out", tmp_path / name)
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / "tidewright.json").write_text("{}")
    (tmp_path / "link").symlink_to(model.parent)
    for other in (prepared, tmp_path / "link" / model.name):
        assert "is not a quantized model; remove it" in refused(model, "--out", other)
    assert (tmp_path / "notes" / "a").read_text() == (tmp_path / "file").read_text() == "mine"
    assert "can't write to" in refused(model, "--out", tmp_path / "file" / "below")


def test_what_is_quantized_already_is_refused(model: Path, tmp_path: Path) -> None:
    run(model, "--out", tmp_path / "once")
    said = refused(tmp_path / "once", "--out", tmp_path / "twice")
    assert "the model is quantized already (compressed-tensors); take the model that it was made from" in said
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "once"}


def test_too_little_space_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda folder: 0)
    assert "free some space" in refused(model, "--out", tmp_path / "made")
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_an_interrupted_run_says_so_and_the_next_continues(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, reported = QuantizationRun.run, []

    def interrupted(self: QuantizationRun, on_progress: object) -> None:
        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        whole(self, stop)

    monkeypatch.setattr(QuantizationRun, "run", interrupted)
    result = run(model, "--out", tmp_path / "made")
    assert (result.exit_code, result.stdout) == (130, "")
    assert "the same command continues" in result.output
    assert not (tmp_path / "made").exists()
    begun = next((tmp_path / ".made.quantizing").glob("*.safetensors")).stat().st_mtime_ns

    def watched(self: QuantizationRun, on_progress: object) -> None:
        whole(self, lambda done, total: reported.append(done / total))

    monkeypatch.setattr(QuantizationRun, "run", watched)
    result = run(model, "--out", tmp_path / "made")
    assert result.exit_code == 0
    assert "Continuing an earlier run; files finished: 1" in result.output
    assert (tmp_path / "made" / "model-00001-of-00004.safetensors").stat().st_mtime_ns == begun
    assert reported == sorted(reported)
    assert reported[-1] == 1
    # If only the last step is missing, nothing is computed again.
    (tmp_path / "made").rename(tmp_path / ".made.quantizing")
    assert run(model, "--out", tmp_path / "made").exit_code == 0
    assert (tmp_path / "made" / "model-00001-of-00004.safetensors").stat().st_mtime_ns == begun
    # What another version has begun or made is no part of it: it may have written it differently.
    (tmp_path / "made").rename(tmp_path / ".made.quantizing")
    with monkeypatch.context() as later:
        later.setattr(quantize_module, "FORMAT_VERSION", quantize_module.FORMAT_VERSION + 1)
        assert run(model, "--out", tmp_path / "made").exit_code == 0
    anew = (tmp_path / "made" / "model-00001-of-00004.safetensors").stat().st_mtime_ns
    assert anew != begun
    assert run(model, "--out", tmp_path / "made").exit_code == 0
    assert (tmp_path / "made" / "model-00001-of-00004.safetensors").stat().st_mtime_ns != anew
    # What was begun for another scheme is no part of it.
    monkeypatch.setattr(QuantizationRun, "run", interrupted)
    run(model, "--out", tmp_path / "other")
    monkeypatch.setattr(QuantizationRun, "run", whole)
    assert run(model, "--out", tmp_path / "other", "--scheme", "w8a8").exit_code == 0
    same = [(tmp_path / name / "model-00001-of-00004.safetensors").read_bytes() for name in ("made", "other")]
    assert same[0] != same[1]


@pytest.mark.heavy
def test_a_full_disk_is_named_and_the_next_run_continues(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "disk"
    script = f"""
        tidewright quantize {str(model)!r} --out {out}/made; echo "small $?"
        resize 40m
        dd if=/dev/zero of={out}/ballast bs=1k count=40500 2>/dev/null
        tidewright quantize {str(model)!r} --out {out}/made; echo "filled $?"
        rm {out}/ballast
        tidewright quantize {str(model)!r} --out {out}/made; echo "room $?"
    """
    done = run_on_small_disk(out, "1m", script)
    said = " ".join(done.stderr.split())
    assert "the quantized model needs 17 MB" in said, done.stderr
    assert [line for line in done.stdout.split("\n") if " " in line] == ["small 1", "filled 1", "room 0"]
    assert (out / "made").exists() is False  # it was on the small disk alone
    assert "Traceback" not in done.stderr
