"""Exported graphs through onnxruntime against transformers: every family, any split of a prompt, any batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers as hf

from helpers.checkpoints import SIZES, expected, prompt, save
from helpers.exports import exported
from helpers.families import FAMILIES, WINDOW
from tidewright.models.families import READERS
from tidewright.onnx_export.symbols import Graph, Symbol, UntranslatableError

PROMPTS = [prompt(length, seed=length) for length in (5, 40, 23)]  # shorter and longer than any window


def last_logits(model: hf.PreTrainedModel, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1].numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_is_what_transformers_computes_in_a_padded_batch(tmp_path: Path, name: str) -> None:
    model = save(tmp_path, FAMILIES[name])
    decoder = exported(tmp_path)
    wanted_BV = np.stack([last_logits(model, ids) for ids in PROMPTS])
    np.testing.assert_allclose(decoder.begin(PROMPTS).logits_BV, wanted_BV, rtol=2e-5, atol=2e-5)
    wanted = [expected(model, ids, 24) for ids in PROMPTS]
    assert decoder.greedy(PROMPTS, 24) == wanted
    assert all(len(set(ids)) > 4 for ids in wanted)


def test_every_architecture_is_exported_here() -> None:
    tested = {f"{type(config).__name__.removesuffix('Config').removesuffix('Text')}" for config in FAMILIES.values()}
    assert tested == {name.removesuffix("ForCausalLM") for name in READERS}


@pytest.mark.parametrize("name", ["llama, tied", "mistral", "gemma 3"])
@pytest.mark.parametrize("int8", [False, True])
def test_a_prompt_may_be_read_in_pieces(tmp_path: Path, name: str, int8: bool) -> None:
    save(tmp_path, FAMILIES[name])
    decoder, ids = exported(tmp_path, int8), PROMPTS[1]
    whole_1V = decoder.begin([ids]).logits_BV
    past = [np.zeros((1, SIZES["num_key_value_heads"], 0, FAMILIES[name].head_dim), np.float32)] * 6
    for start, end in ((0, 3), (3, 4), (4, 4 + 2 * WINDOW), (4 + 2 * WINDOW, len(ids))):
        mask, positions = np.ones((1, end), np.int64), np.arange(start, end)[None]
        logits_1V, past = decoder.run(np.array([ids[start:end]]), mask, positions, past)
    assert past[0].shape[2] == len(ids)
    np.testing.assert_allclose(logits_1V, whole_1V, rtol=2e-5, atol=5e-3 if int8 else 2e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["llama, tied", "qwen 2, windows", "gemma 2"])
def test_neighbours_in_a_batch_change_nothing(tmp_path: Path, name: str, int8: bool) -> None:
    save(tmp_path, FAMILIES[name])
    decoder = exported(tmp_path, int8)
    together = decoder.begin(PROMPTS)
    alone = [decoder.begin([ids]) for ids in PROMPTS]
    for token_ids in ([7, 8, 9], [70, 80, 90]):
        # In int8, a sum in another order may round a code to its neighbour (0.006 with AVX2); scales shared by a batch
        # are off by 0.1.
        wanted_BV = np.concatenate([one.logits_BV for one in alone])
        np.testing.assert_allclose(together.logits_BV, wanted_BV, rtol=1e-5, atol=2e-2 if int8 else 1e-5)
        together.add(token_ids)
        for one, token in zip(alone, token_ids, strict=True):
            one.add([token])


def test_what_stands_in_the_padding_is_never_seen(tmp_path: Path) -> None:
    save(tmp_path, FAMILIES["mistral"])
    decoder = exported(tmp_path)
    ids_BT = np.array([[0, 0, 0, 5, 6, 7], [3, 4, 5, 6, 7, 8]])
    mask_BT = np.array([[0, 0, 0, 1, 1, 1], [1] * 6])
    positions_BT = np.array([[0, 0, 0, 0, 1, 2], range(6)])
    empty = [np.zeros((2, 2, 0, 12), np.float32)] * 6
    logits_BV, present = decoder.run(ids_BT, mask_BT, positions_BT, empty)
    assert all(np.isfinite(tensor).all() for tensor in present)
    ids_BT[0, :3], positions_BT[0, :3] = 99, 17
    np.testing.assert_array_equal(decoder.run(ids_BT, mask_BT, positions_BT, empty)[0], logits_BV)
    mask_BT[0, 2] = 1
    assert not np.allclose(decoder.run(ids_BT, mask_BT, positions_BT, empty)[0][0], logits_BV[0], atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_int8_stays_close_to_transformers(tmp_path: Path, name: str) -> None:
    model = save(tmp_path, FAMILIES[name])
    decoder = exported(tmp_path, int8=True)
    wanted_BV = np.stack([last_logits(model, ids) for ids in PROMPTS])
    error_BV = decoder.begin(PROMPTS).logits_BV - wanted_BV
    assert 0 < error_BV.std() < 0.12 * wanted_BV.std()


@pytest.mark.parametrize("int8", [False, True])
def test_names_types_and_sizes(tmp_path: Path, int8: bool) -> None:
    save(tmp_path, FAMILIES["qwen 3"])
    exported(tmp_path, int8)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph

    def shapes(values: list[onnx.ValueInfoProto]) -> dict[str, list[str | int]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    past = {
        f"past_key_values.{layer}.{kind}": ["batch", 2, "past", 12] for layer in range(3) for kind in ("key", "value")
    }
    ids = {"input_ids": ["batch", "new"], "attention_mask": ["batch", "total"], "position_ids": ["batch", "new"]}
    assert shapes(graph.input) == ids | past
    present = {f"present.{layer}.{kind}": ["batch", 2, "total", 12] for layer in range(3) for kind in ("key", "value")}
    assert shapes(graph.output) == {"logits": ["batch", SIZES["vocab_size"]]} | present


def test_a_tied_embedding_is_there_once(tmp_path: Path) -> None:
    for int8, wanted in ((False, 4), (True, 1)):
        sizes = {}
        for tied in (True, False):
            folder = tmp_path / f"{int8}{tied}"
            sizes_of = SIZES | {"vocab_size": 65536, "hidden_size": 64, "num_attention_heads": 2}
            save(folder, hf.LlamaConfig(**sizes_of, tie_word_embeddings=tied))
            exported(folder, int8)
            sizes[tied] = (folder / "model.onnx.data").stat().st_size
        scales = 4 / 32 if int8 else 0
        assert sizes[False] - sizes[True] == pytest.approx(65536 * 64 * (wanted + scales), rel=0.01)


def test_an_unknown_function_is_named() -> None:
    with pytest.raises(UntranslatableError, match="torch's sigmoid has no translation"):
        torch.sigmoid(Symbol(Graph({}, int8=False), "x", (0, 3)))  # type: ignore[arg-type]
    with pytest.raises(UntranslatableError, match="slice"):
        Symbol(Graph({}, int8=False), "x", (0, 3))[:, 1:]
