"""What the engine asks of the one that runs its plans: model_runner.py on torch, onnx_runner.py on onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from tidewright.engine.plan import StepPlan, StepResult
from tidewright.lora.adapter import Adapter
from tidewright.memory.account import FixedMemory
from tidewright.sampling.guided import GuidedDecoding

# A pool that holds less than this is a mistake, whatever the longest sequence may be.
USEFUL_TOKENS = 256


class EngineConfigError(ValueError):
    """The engine's configuration asks for what this machine or model doesn't have."""


@dataclass(frozen=True, eq=False)
class LaunchedStep:
    """A step that the device has been given."""

    result: Callable[[], StepResult]
    """Waits for the device. To be called once, and in the order of the launches."""


class Runner(Protocol):
    """`num_blocks` of its KV cache; `progress` grows as long as a step comes on, however long it takes."""

    steps_in_flight: int  # that may be launched before the oldest one's result is taken
    vocab_size: int
    guided: GuidedDecoding
    eos_ids: tuple[int, ...]
    max_model_len: int
    adapter_slots: int  # LoRA adapters that sequences of one step may have; 0: none are taken
    embedding_size: int  # numbers; 0: it generates text
    forward_seconds: float  # of all steps, by the device's clock
    sample_seconds: float  # logits and sampling, likewise
    fixed_memory: FixedMemory

    @property
    def device_name(self) -> str: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def touched_blocks(self) -> int: ...  # that were ever used, and take memory
    @property
    def progress(self) -> int: ...
    def read_adapter(self, path: str) -> Adapter: ...  # beside all else; raises AdapterError
    def add_adapter(self, name: str, adapter: Adapter) -> None: ...
    def drop_adapter(self, name: str) -> None: ...
    def launch(self, plan: StepPlan) -> LaunchedStep: ...
    def resize(self, num_blocks: int, moves: Mapping[int, int]) -> None: ...
    def trim(self) -> None: ...  # after a step that ran out of memory: gives back what it left
