"""The figures of a report, against torch's own cross-entropy and transformers' tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.checkpoints import expected, prompt, save
from helpers.exports import exported, save_tokenizer
from helpers.families import FAMILIES
from tidewright.onnx_export.report import ANSWER, READ, Reference, read_passages
from tidewright.onnx_export.source import SourceModel

TEXTS = [prompt(length, seed=length) for length in (40, 44, 50)]


def test_figures_of_an_exact_and_of_a_damaged_export(tmp_path: Path) -> None:
    model = save(tmp_path / "a", FAMILIES["llama, tied"])
    exported(tmp_path / "a")
    source = SourceModel(tmp_path / "a")
    reference = Reference(source, TEXTS)
    with torch.inference_mode():
        ids_BT = torch.tensor([ids[:40] for ids in TEXTS])
        logits_BTV = model(ids_BT).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    assert reference.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert reference.answers == [expected(model, ids, ANSWER) for ids in reference.prompts]
    assert len({len(ids) for ids in reference.prompts}) == len(TEXTS)

    exact = reference.compare(tmp_path / "a" / "model.onnx", 123, lambda done, total: None)
    assert (exact.bytes, exact.same_next_token, exact.common_prefix) == (123, 1.0, ANSWER)
    assert exact.perplexity == pytest.approx(reference.perplexity, rel=1e-4)

    torch.nn.init.normal_(model.model.layers[1].mlp.down_proj.weight, std=0.2)
    model.save_pretrained(tmp_path / "b")
    exported(tmp_path / "b")
    damaged = reference.compare(tmp_path / "b" / "model.onnx", 1, lambda done, total: None)
    assert damaged.same_next_token < 0.9
    assert damaged.common_prefix < ANSWER
    report = reference.report({"float32": damaged})
    assert (report.tokens, report.answer_tokens, report.models) == (120, ANSWER, {"float32": damaged})


def test_passages_are_long_enough_for_any_tokenizer(tmp_path: Path, model_dir: Path) -> None:
    assert [len(ids) for ids in read_passages(model_dir, 8192)] == [READ] * 4
    assert [len(ids) for ids in read_passages(model_dir, 20)] == [20] * 4
    save_tokenizer(tmp_path)
    assert [len(ids) for ids in read_passages(tmp_path, 8192)] == [READ] * 4
