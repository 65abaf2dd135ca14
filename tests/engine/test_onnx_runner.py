"""The engine on onnxruntime: the same tokens as transformers', whatever is scheduled when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from engine.test_engine import tokens
from helpers.checkpoints import expected, prompt, save
from helpers.exports import save_tokenizer
from helpers.families import FAMILIES
from helpers.one_engine import outputs_of_engine
from tidewright.engine.engine import Engine
from tidewright.engine.messages import EngineConfig, Submit
from tidewright.engine.onnx_runner import OnnxRunner
from tidewright.launch.export import export
from tidewright.onnx_export.manifest import model_file
from tidewright.onnx_export.session import OnnxDecoder
from tidewright.schema import SamplingParams

BYTES_PER_TOKEN = 2 * 3 * 2 * 12 * 4  # k and v, layers, KV heads, head size, float32
LENGTHS = (1, 5, 23, 40, 12)
TOKENS, EOS = 20, 2

Model = tuple[Path, Path, transformers.PreTrainedModel]


@pytest.fixture(scope="module", params=["qwen 3", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A checkpoint, its export in float32, and transformers' own."""
    folder = tmp_path_factory.mktemp("model")
    torch_model = save(folder, FAMILIES[request.param])
    save_tokenizer(folder)
    target = folder / "onnx"
    export(folder, target, ("float32",), Console(quiet=True))
    return folder, target, torch_model


def engine(model: Model, **changes: Any) -> Engine:
    values = {"model_dir": str(model[1]), "is_onnx": True, "threads": 1, "block_size": 4, "kv_cache_memory": "4MiB"}
    return Engine(EngineConfig(prefix_caching=False, **(values | changes)))


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "seed": 0, "max_tokens": TOKENS, **changes})


def wanted(model: Model, ids: list[int]) -> list[int]:
    """By transformers, up to the end of the sequence."""
    answer = expected(model[2], ids, TOKENS)
    return answer[: answer.index(EOS) + 1] if EOS in answer else answer


@pytest.mark.parametrize("steps_between", [0, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_batched_tokens": 7},
        {"kv_cache_memory": str(84 * BYTES_PER_TOKEN), "max_model_len": 64},
        {"max_running": 2},
    ],
    ids=["all at once", "chunks", "preemption", "two at a time"],
)
def test_greedy_tokens_are_those_of_transformers(model: Model, changes: dict[str, Any], steps_between: int) -> None:
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    made = engine(model, **changes)
    outputs = outputs_of_engine(made, [Submit(i, ids, greedy()) for i, ids in enumerate(prompts)], steps_between)
    assert tokens(outputs) == [wanted(model, ids) for ids in prompts]
    stats = made.stats()
    assert stats.blocks_free == stats.blocks_total
    # One of the two models ends its answers too soon to run out of blocks.
    if all(len(got) == TOKENS for got in tokens(outputs)):
        assert (stats.preemptions > 0) == ("max_model_len" in changes)


def test_only_what_runs_has_a_past(model: Model) -> None:
    """A preempted sequence is computed anew: what it had is not in the blocks that the pool counts any longer."""
    made = engine(model, kv_cache_memory=str(84 * BYTES_PER_TOKEN), max_model_len=64)
    for i, length in enumerate(LENGTHS):
        assert made.submit(Submit(i, prompt(length, seed=length), greedy(ignore_eos=True))) is None
    runner = made.runner
    assert isinstance(runner, OnnxRunner)
    while made.has_work:
        made.step()
        waiting = made.scheduler._by_id.keys() - {sequence.request_id for sequence in made.scheduler.running}
        assert not waiting & runner._past.keys()
        assert not waiting & set(runner._together if runner._batch else ())
        held = sum(past[0].shape[2] for past in runner._past.values())
        assert held <= runner.num_blocks * made.config.block_size
    assert made.stats().preemptions > 0


def test_a_seeded_request_draws_the_same_alone_and_among_others(model: Model) -> None:
    requests = [
        Submit(i, prompt(length, seed=length), greedy(temperature=1.0, seed=i, top_p=0.9))
        for i, length in enumerate(LENGTHS)
    ]
    alone = [tokens(outputs_of_engine(engine(model), [request]))[0] for request in requests]
    assert tokens(outputs_of_engine(engine(model), requests)) == alone


def test_only_allowed_tokens_come(model: Model) -> None:
    request = Submit(1, prompt(9, seed=3), greedy(temperature=1.0, allowed_token_ids=[5, 6], ignore_eos=True))
    (got,) = tokens(outputs_of_engine(engine(model), [request]))
    assert set(got) == {5, 6}


def test_what_was_generated_elsewhere_is_gone_on_with(model: Model) -> None:
    ids = prompt(9, seed=3)
    whole = wanted(model, ids)
    got = outputs_of_engine(engine(model), [Submit(1, ids, greedy(), output_token_ids=whole[:4])])
    assert tokens(got) == [whole[4:]]


def test_prompt_logprobs_are_those_of_transformers(model: Model) -> None:
    ids = prompt(17, seed=1)
    with torch.inference_mode():
        wanted_TV = model[2](torch.tensor([ids])).logits[0].log_softmax(-1)
    params = greedy(prompt_logprobs=2, max_tokens=3)
    for changes in ({}, {"max_batched_tokens": 5}, {"max_batched_tokens": 1}):
        first = outputs_of_engine(engine(model, **changes), [Submit(1, ids, params)])[1][0]
        assert first.prompt_logprobs is not None
        assert len(first.prompt_logprobs) == len(ids) - 1
        for row_V, token, entries in zip(wanted_TV, ids[1:], first.prompt_logprobs, strict=False):
            assert [entry.token_id for entry in entries] == [token, *row_V.topk(2).indices.tolist()]
            assert entries[0].logprob == pytest.approx(row_V[token].item(), abs=1e-4)


def refusal(model: Model, **changes: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        engine(model, **changes)
    return str(caught.value)


def copied(target: Path, to: Path) -> Path:
    to.mkdir()
    for file in target.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_what_cannot_be_loaded_is_refused_with_the_reason(model: Model, tmp_path: Path) -> None:
    assert "no complete ONNX export" in refusal(model, model_dir=str(tmp_path / "nothing"))

    corrupt = copied(model[1], tmp_path / "corrupt")
    graph = corrupt / model_file("float32")
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    assert f"{graph} can't be run" in refusal(model, model_dir=str(corrupt))

    assert "an ONNX model has a KV cache of its own format; choose auto" in refusal(model, kv_cache_dtype="int8")

    short = copied(model[1], tmp_path / "short")
    (short / model_file("float32")).write_bytes(b"")
    assert "no complete ONNX export" in refusal(model, model_dir=str(short))


def test_an_opset_that_this_onnxruntime_does_not_know_is_refused(model: Model, tmp_path: Path) -> None:
    import onnx

    proto = onnx.load(model[1] / model_file("float32"), load_external_data=False)
    proto.opset_import[0].version = 999
    file = tmp_path / "new.onnx"
    onnx.save(proto, file)
    with pytest.raises(ValueError, match=r"new\.onnx can't be run: .*999"):
        OnnxDecoder(file)


def test_a_provider_that_is_not_there_is_named_and_the_cpu_runs(
    model: Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    made = engine(model, device="cuda")
    assert made.ready().device == "cpu"
    assert "no CUDAExecutionProvider (it has CPUExecutionProvider), so the CPU runs the model" in caplog.text
    caplog.clear()
    assert engine(model, device="auto").ready().device == "cpu"
    assert not caplog.text
