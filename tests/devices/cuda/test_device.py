"""The engine's steps on devices/cuda/device.py, with interpreted kernels, against transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checkpoints import engine_config, expected, greedy, logits, prompt, save
from helpers.families import FAMILIES
from helpers.interpreted import interpreted
from tidewright.attention.reference import ReferenceAttention
from tidewright.devices import registry
from tidewright.devices.base import Device, DeviceError
from tidewright.devices.cpu.device import CpuDevice
from tidewright.devices.cpu.memory import CpuMemory
from tidewright.engine import model_runner
from tidewright.engine.engine import Engine
from tidewright.engine.messages import SequenceOutput, Submit, TokenLogprob
from tidewright.engine.model_runner import ModelRunner
from tidewright.sampling.guided import GuidedDecoding
from tidewright.schema import SamplingParams

with interpreted():
    from tidewright.devices.cuda.device import CudaDevice
    from tidewright.devices.cuda.sampler import CudaSampler

CPU = torch.device("cpu")


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["qwen 3", "gemma 2"])  # with all that a layer may have; llama: below
def test_families_as_transformers_computes_them(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path, FAMILIES[name])
    device = CudaDevice(torch.device("cpu"), CpuMemory())
    monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: device)
    runner = ModelRunner(engine_config(tmp_path, block_size=16))
    assert runner.device is device
    ids = prompt(40, seed=1)
    with torch.inference_mode():
        wanted_TV = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(runner, ids, chunk=25), wanted_TV, rtol=1e-4, atol=1e-4)
    prompts = [prompt(length, seed=length) for length in (5, 30)]
    assert greedy(runner, prompts, 3, chunk=16) == [expected(model, ids, 3) for ids in prompts]


class SamplesAsAGpu(CpuDevice):
    """The layers are the CPU's, whose interpretation would take most of the time."""

    def sampler(self, guided: GuidedDecoding) -> CudaSampler:
        return CudaSampler(guided, self.torch_device)


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.5, "top_p": 0.8, "top_k": 40, "logprobs": 0},
    {"temperature": 0.0, "presence_penalty": 1.0, "repetition_penalty": 1.5, "prompt_logprobs": 1},
    {"temperature": 0.7, "frequency_penalty": 1.0, "logit_bias": {5: 3.0}},
    {"temperature": 3.0, "allowed_token_ids": [5, 6, 7, 9], "bad_words": ["5 6", "7"], "min_tokens": 3},
]


def reported(outputs: list[SequenceOutput], name: str) -> list[TokenLogprob]:
    return [entry for output in outputs for entries in getattr(output, name) or [] for entry in entries]


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of sums that greedy rows have not
@pytest.mark.parametrize("speculative_tokens", [0, 2])
def test_an_engine_that_draws_on_a_gpu(
    tmp_path: Path, speculative_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks, preemptions, and places that pass from one to the next."""
    save(tmp_path, FAMILIES["llama, tied"])
    sizes = {"max_running": 3, "max_batched_tokens": 20, "max_model_len": 40, "kv_cache_memory": str(56 * 384)}
    config = engine_config(tmp_path, attention="reference", speculative_tokens=speculative_tokens, **sizes)

    def drawn() -> dict[int, list[SequenceOutput]]:
        engine = Engine(config)
        outputs: dict[int, list[SequenceOutput]] = {}
        for number, params in enumerate(SAMPLED):
            words = [[5, 6], [7]] if "bad_words" in params else []
            sampling = SamplingParams(max_tokens=9, seed=number, **params)
            engine.submit(Submit(number, prompt(6 + number, seed=number) + [8, 9] * 3, sampling, bad_words_ids=words))
        while engine.has_work:
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
        assert engine.stats().preemptions or speculative_tokens
        return outputs

    wanted = drawn()
    monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: SamplesAsAGpu(ReferenceAttention(4, CPU)))
    got = drawn()
    assert got.keys() == wanted.keys() == {*range(len(SAMPLED))}
    for number, outputs in wanted.items():
        assert [output.token_ids for output in got[number]] == [output.token_ids for output in outputs]
        for name in ("logprobs", "prompt_logprobs"):
            ours, theirs = (
                [e for o in some for r in getattr(o, name) or [] for e in r] for some in (got[number], outputs)
            )
            assert [(one.token_id, one.rank) for one in ours] == [(one.token_id, one.rank) for one in theirs]
            assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=1e-4)
            assert bool(ours) == (name in SAMPLED[number])


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_quantized_cache_as_the_reference_has_it(
    tmp_path: Path, kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, FAMILIES["llama, tied"])
    config = engine_config(tmp_path, block_size=16, kv_cache_dtype=kv_cache_dtype, attention="reference")
    ids = prompt(20, seed=1)
    wanted_TV = logits(ModelRunner(config), ids, chunk=15)
    device = CudaDevice(torch.device("cpu"), CpuMemory())
    monkeypatch.setattr(model_runner, "make_device", lambda *_, **__: device)
    torch.testing.assert_close(logits(ModelRunner(config), ids, chunk=15), wanted_TV, rtol=1e-3, atol=1e-3)


def test_a_gpu_computes_with_the_kernels_where_they_take_the_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/nowhere")

    def made(attention: str, head_dim: int) -> Device:
        return registry.make_device("cuda:1", attention, 16, torch.bfloat16, head_dim)

    assert isinstance(device := made("auto", 64), CudaDevice)
    assert [device.torch_device] == current == [torch.device("cuda:1")]
    assert isinstance(made("reference", 64).attention, ReferenceAttention)
    assert not caplog.messages
    assert isinstance(made("auto", 320).attention, ReferenceAttention)
    assert "even head sizes up to 256, not 320" in caplog.text
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"needs PyPI's triton \(pip install tidewright\[gpu\]\); choose 'auto'"):
        made("native", 64)
    with pytest.raises(DeviceError, match="torch sees 2 GPUs"):
        registry.make_device("cuda:2", "auto", 16, torch.bfloat16, 64)
