"""LoRA adapters on tensor-parallel ranks, as real processes: PEFT's tokens, and what one rank can't read none takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import transformers

from helpers.adapters import save_adapter
from helpers.checkpoints import SIZES, expected, prompt, save
from helpers.engine_process import Bridge, bridge, config, hear_ready
from tidewright.engine.messages import AdapterChanged, LoadAdapter, SequenceOutput, StepOutputs, Submit, UnloadAdapter
from tidewright.schema import SamplingParams

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0, seed=0)


class Conversation:
    """What was heard is kept until it is asked for."""

    def __init__(self, engine: Bridge) -> None:
        self.engine = engine
        self._changes: list[AdapterChanged] = []
        self._outputs: list[SequenceOutput] = []

    def _hear(self) -> None:
        message = self.engine.hear()
        if isinstance(message, AdapterChanged):
            self._changes.append(message)
        elif isinstance(message, StepOutputs):
            self._outputs += message.outputs

    def change(self) -> AdapterChanged:
        while not self._changes:
            self._hear()
        return self._changes.pop(0)

    def answers(self, requests: list[Submit]) -> list[list[int] | str]:
        """Tokens, or why there are none."""
        numbers = [request.request_id for request in requests]
        while {output.request_id for output in self._outputs if output.finish_reason} != set(numbers):
            self._hear()
        found: dict[int, list[int] | str] = {number: [] for number in numbers}
        for output in self._outputs:
            said = found[output.request_id]
            if isinstance(said, list) and output.finish_reason != "invalid":
                said += output.token_ids
            else:
                found[output.request_id] = output.message
        self._outputs = []
        return [found[number] for number in numbers]


def spoil(folder: Path) -> None:
    """The last column of a matrix that is cut by columns: the last rank alone sees it."""
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"][0, -1] = float("nan")
    safetensors.torch.save_file(tensors, file)


@pytest.mark.heavy
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_add_up_what_peft_says(tmp_path: Path, size: int) -> None:
    """3 heads, and 80 features of the MLP: parts are uneven."""
    sizes: dict[str, Any] = {**SIZES, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    base = save(tmp_path / "model", transformers.LlamaConfig(**sizes))
    oracles: dict[str, Any] = {"": base}
    for number, name in enumerate(("one", "two", "bad")):
        oracles[name] = save_adapter(base, tmp_path / name, seed=number, use_rslora=number == 1)
    spoil(tmp_path / "bad")
    options = {"adapter_folder": str(tmp_path), "max_adapters": 1, "block_size": 4, "tensor_parallel_size": size}
    with bridge() as started:
        started.begin(config(tmp_path / "model", **options))
        hear_ready(started)
        talk = Conversation(started)
        # At once: each request waits for its adapter, and the two adapters for the one slot.
        for name in ("one", "bad", "two"):
            started.say(LoadAdapter(name, name))
        names = ["one", "two", "", "two", "bad", "one"]
        requests = [Submit(n, prompt(5 + n, seed=n), GREEDY, adapter=name) for n, name in enumerate(names)]
        for request in requests:
            started.say(request)
        changes = {change.name: change for change in (talk.change() for _ in range(3))}
        assert (changes["one"].loaded, changes["two"].loaded, changes["bad"].loaded) == (True, True, False)
        problem = f"rank {size - 1}: lora_A of model.layers.0.mlp.down_proj has numbers that are not finite"
        assert changes["bad"].error.startswith(problem)
        numbers = sum(weight.numel() for name, weight in oracles["one"].named_parameters() if "lora" in name)
        assert changes["one"].bytes >= 4 * numbers
        wanted: list[list[int] | str] = [
            f"no adapter 'bad' is loaded now: {changes['bad'].error}"
            if request.adapter == "bad"
            else expected(oracles[request.adapter], request.prompt_token_ids, 8)
            for request in requests
        ]
        assert talk.answers(requests) == wanted
        # Unloaded, and other weights under the name.
        started.say(UnloadAdapter("one"))
        assert talk.change() == AdapterChanged("one", False)
        started.say(LoadAdapter("one", "two"))
        assert talk.change().loaded
        again = [Submit(9, requests[0].prompt_token_ids, GREEDY, adapter="one")]
        started.say(again[0])
        assert talk.answers(again) == [expected(oracles["two"], again[0].prompt_token_ids, 8)]
