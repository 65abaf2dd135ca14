"""Options of an engine: where and how its model is computed, its memory, its pace, its LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
from pydantic import BaseModel, Field, field_validator, model_validator

from tidewright.distributed.gpu_choice import DEVICE_PATTERN, gpus_of
from tidewright.engine.messages import AsyncScheduling, parse_rendezvous
from tidewright.engine.targets import Targets
from tidewright.kv_cache.budget import is_share, parse_memory
from tidewright.schema import MAX_ADAPTER_NAME, MAX_ADAPTERS_KNOWN, AdapterName, Pooling, Task


class EngineSettings(BaseModel):
    device: str = Field(
        "auto",
        pattern=DEVICE_PATTERN,
        description="Where the model runs: auto, cpu, cuda, cuda:N, or cuda:N,M with a GPU for each rank of a host. "
        "auto takes a GPU if there is one.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="Number format of weights and of what is computed."
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8", "int8"] = Field(
        "auto",
        description="Number format of the KV cache: auto is `dtype`; fp8 (e4m3) and int8, with a scale for each token "
        "and head, take half the memory of bfloat16.",
    )
    quantization: Literal["auto", "none", "stored", "int8", "w8a8", "int4-g32", "int4-g64", "int4-g128", "fp8"] = Field(
        "auto",
        description="Format of the linear layers' weights: int8, w8a8, int4-g32, int4-g64, int4-g128 or fp8 quantize "
        "plain weights while loading, none dequantizes, stored serves a quantized checkpoint as it is. auto: stored, "
        "unless the checkpoint has plain weights as well.",
    )
    quantize_head: Literal["int8", "same", "keep"] = Field(
        "int8", description="Head and embedding: in 8 bits, by the same scheme as the layers, or kept as they are."
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of the engine; 0: as many as CPU affinity and quota allow, fewer while other "
        "processes use the cores.",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, le=1024, description="Ranks that the model is cut over: GPUs, or processes on CPU cores."
    )
    nodes: int = Field(
        1,
        ge=1,
        le=128,
        description="Hosts that share the ranks equally; all but this one run `tidewright worker`.",
    )
    rendezvous: str = Field(
        "", description="HOST:PORT where the ranks of other hosts come to: an address of this host that they reach."
    )
    rendezvous_secret_file: str = Field(
        "",
        description="File with a secret, of 16 bytes or more, that ranks must know. Empty: none; only for a "
        "rendezvous on the loopback.",
    )
    attention: Literal["auto", "native", "reference"] = Field(
        "auto", description="Attention implementation; auto takes the fastest that the device has."
    )
    block_size: int = Field(16, ge=1, le=256, description="Tokens in one block of the KV cache.")
    kv_cache_memory: str = Field(
        "auto",
        description="Memory of the KV cache, for all models together: 1GiB, 512MiB, or 80% of what is free once the "
        "weights are loaded (on a GPU less what the largest step takes; in a container, of what its limit leaves). "
        "auto: 1GiB on a CPU, or 80% of what is free where that is less; 90% on a GPU.",
    )
    kv_cache_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of `kv_cache_memory` that the model gets where several share it. 0: of what the shares of "
        "others leave, as much as each other model without one.",
    )
    memory_budget: str = Field(
        "auto",
        description="Memory of the device for weights, KV cache, adapters and what a step takes together: 8GiB, or "
        "80% of all that the device, machine or container has. The KV cache takes no more than the others leave; of "
        "several models each has its `kv_cache_share` of it. auto: what they take, with the KV cache of "
        "kv_cache_memory.",
    )
    max_model_len: int = Field(
        0, ge=0, description="Longest prompt plus output, in tokens; 0 takes the model's own limit."
    )
    max_batched_tokens: int = Field(2048, ge=1, description="Tokens computed in one engine step, at most.")
    prefill_step_time: float = Field(
        0.25,
        ge=0,
        le=60,
        description="Seconds that a step should take while streams wait for their next token: it computes as much of "
        "the prompts beside them as that allows, by what tokens were measured to cost. 0: up to max_batched_tokens. "
        "A tpot_target takes its place.",
    )
    ttft_target: float = Field(
        0.0,
        ge=0,
        le=3600,
        description="Seconds from arrival to the first token that the server aims at: a request that is "
        "expected to take more than 0.8 of it is refused at once, as overloaded. 0: none.",
    )
    tpot_target: float = Field(
        0.0,
        ge=0,
        le=60,
        description="Seconds between two tokens of a stream that the server aims at: steps with prompts are as short, "
        "and fewer sequences run where streams alone would take longer. 0: none.",
    )
    class_targets: str = Field(
        "",
        description="Targets of priority classes instead of the server's: PRIORITY:ttft=SECONDS:tpot=SECONDS with "
        "commas between, each for that priority and larger numbers up to the next class; 0: none.",
    )
    max_running: int = Field(64, ge=1, le=4096, description="Sequences computed in one engine step, at most.")
    prefix_caching: bool = Field(True, description="Share the KV blocks of equal prompt beginnings.")
    speculative_tokens: int = Field(
        0, ge=0, le=16, description="Tokens guessed by prompt lookup in one step, at most; 0 switches it off."
    )
    async_scheduling: AsyncScheduling = Field(
        "auto",
        description="Plan and launch a step while the device computes the one before: on, off, or auto, which is on "
        "for a GPU. A step waits all the same where a choice depends on the token before: guided output, penalties, "
        "bad_words, speculative_tokens.",
    )
    task: Task = Field(
        "generate",
        description="What the model is served for: generate text, or embed, which gives one vector for each prompt.",
    )
    pooling: Pooling = Field(
        "last", description="Task embed: the vector is the final hidden state of the last token, or the mean of all."
    )
    normalize: bool = Field(True, description="Task embed: scale each vector to length 1.")
    adapter_folder: str = Field(
        "",
        description="Folder below which LoRA adapters in Hugging Face PEFT format lie: only from there they are loaded "
        "while the server runs. Empty: none.",
    )
    adapters: str = Field(
        "",
        description="LoRA adapters that are loaded at the start: NAME=PATH,NAME=PATH, with paths below "
        "`adapter_folder`. Requests name one as `model`.",
    )
    max_adapters: int = Field(
        8, ge=1, le=64, description="LoRA adapters that the sequences of one step may use; requests for more wait."
    )
    max_lora_rank: int = Field(64, ge=1, le=512, description="Highest rank of a LoRA adapter; one of more is refused.")
    adapter_memory: str = Field(
        "1GiB",
        description="Memory of the host for LoRA adapters, e.g. 512MiB. The least recently used give way, and are "
        "read again from their folder when a request wants them.",
    )
    max_waiting: int = Field(512, ge=0, description="Requests that may wait; one more is refused as overloaded.")
    streaming_share: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Share of the usable CPU cores, if the model runs on them, that sending streams may take; above "
        "it, tokens of a stream leave together, at least every 0.1 s. 1: each token at once.",
    )

    @field_validator("kv_cache_memory", "memory_budget")
    @classmethod
    def _memory_is_readable(cls, value: str) -> str:
        check_memory(value)
        return value

    @field_validator("adapter_memory")
    @classmethod
    def _memory_is_bytes(cls, value: str) -> str:
        if is_share(value):
            raise ValueError(f"{value!r} is a share; write an amount of memory, e.g. 1GiB")
        parse_memory(value, 1)
        return value

    @field_validator("rendezvous_secret_file", "adapter_folder")
    @classmethod
    def _is_the_same_in_other_folders(cls, value: str) -> str:
        return str(Path(value).absolute()) if value else ""

    @field_validator("adapters")
    @classmethod
    def _adapters_are_readable(cls, value: str) -> str:
        parse_adapters(value)
        return value

    @field_validator("class_targets")
    @classmethod
    def _class_targets_are_readable(cls, value: str) -> str:
        Targets(classes=value)
        return value

    @property
    def adapter_paths(self) -> dict[str, str]:
        """Of `adapters`, by name."""
        return parse_adapters(self.adapters)

    @model_validator(mode="after")
    def _can_be_computed(self) -> EngineSettings:
        if self.tensor_parallel_size % self.nodes:
            raise ValueError(
                f"tensor_parallel_size is {self.tensor_parallel_size}, which {self.nodes} nodes can't share equally"
            )
        if self.device.startswith("cuda"):
            gpus_of(self.device, self.tensor_parallel_size // self.nodes)
        if (self.nodes > 1) != bool(self.rendezvous):
            raise ValueError("nodes > 1 and rendezvous go together: the other hosts come to HOST:PORT")
        if self.rendezvous:
            parse_rendezvous(self.rendezvous)
        if self.adapters and not self.adapter_folder:
            raise ValueError("adapters need adapter_folder: they are loaded from below it, and from nowhere else")
        if self.max_model_len == 1 and self.task != "embed":
            raise ValueError("max_model_len is 1, which leaves no token for the output beside a prompt; 2 is the least")
        if self.task == "embed" and self.speculative_tokens:
            raise ValueError("speculative_tokens is for generated text, of which task embed has none; leave it out")
        if self.task != "embed" and (self.pooling != "last" or not self.normalize):
            raise ValueError("pooling and normalize are for embeddings; add task: embed (--task embed)")
        return self


def check_memory(value: str) -> None:
    """Raises ValueError: it is neither an amount of memory nor auto."""
    if value != "auto":
        parse_memory(value, 1)


def parse_adapters(text: str) -> dict[str, str]:
    """Paths by name. Raises ValueError: it is not NAME=PATH,NAME=PATH."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, path = part.partition("=")
        if not equals or not path:
            raise ValueError(f"{part!r} must be NAME=PATH")
        try:
            msgspec.convert(name, AdapterName)
        except msgspec.ValidationError:
            raise ValueError(
                f"{name!r} must have 1 to {MAX_ADAPTER_NAME} letters, digits or ._:/@+-, and begin with a letter or "
                "digit"
            ) from None
        if name in found:
            raise ValueError(f"{name} stands twice")
        found[name] = path
    if len(found) > MAX_ADAPTERS_KNOWN:
        raise ValueError(f"there are {len(found)} adapters, more than the limit of {MAX_ADAPTERS_KNOWN}")
    return found
