"""The one configuration object: flags, environment (`TIDEWRIGHT_*`) and a YAML file, validated once at start.

Precedence: flags, then environment, then the YAML file, then the defaults here. `tidewright serve --help`
and docs/configuration.md are made from these fields.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import msgspec
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from tidewright.cache import EMBEDDED_MODEL
from tidewright.config_file import read_options
from tidewright.distributed.gpu_choice import DEVICE_PATTERN, gpus_of
from tidewright.engine.messages import AsyncScheduling, EngineConfig, parse_rendezvous
from tidewright.kv_cache.budget import is_share, parse_memory
from tidewright.logs.setup import LogFormat, LogLevel
from tidewright.resilience.config import ResilienceSettings
from tidewright.schema import MAX_ADAPTER_NAME, MAX_ADAPTERS_KNOWN, AdapterName, Pooling, Task
from tidewright.served_models import Listed, ServedModel, check_names, served_name, with_smaller_variant
from tidewright.tracing.endpoint import OtlpEndpoint

CONFIG_FILE_VARIABLE = "TIDEWRIGHT_CONFIG"
OF_A_MODEL = (
    "device",
    "dtype",
    "kv_cache_dtype",
    "quantization",
    "quantize_head",
    "threads",
    "tensor_parallel_size",
    "attention",
    "block_size",
    "kv_cache_share",
    "max_model_len",
    "max_batched_tokens",
    "prefill_step_time",
    "ttft_target",
    "tpot_target",
    "max_running",
    "prefix_caching",
    "speculative_tokens",
    "async_scheduling",
    "adapter_folder",
    "adapters",
    "max_adapters",
    "max_lora_rank",
    "adapter_memory",
    "task",
    "pooling",
    "normalize",
    "max_waiting",
)
"""Options that a model beside the first may have of its own."""


class Settings(ResilienceSettings, BaseSettings):
    """Options of `tidewright serve`; each is also `TIDEWRIGHT_<NAME>` and a key of the YAML file."""

    model_config = SettingsConfigDict(env_prefix="TIDEWRIGHT_", extra="forbid", frozen=True)

    model: str = Field(
        EMBEDDED_MODEL,
        min_length=1,
        description="Prepared name, model folder, GGUF file or hub id (`org/name`, `org/name@revision`) to serve.",
    )
    served_model_name: str = Field(
        "",
        description="Name of `model` in the gateway's API. Empty: the last part of `model`, without a revision.",
    )
    models: Listed[ServedModel] = Field(
        [],
        description="Further models, each with an engine of its own (docs/serving.md). The flag is `--model` once "
        "more, as SOURCE or NAME=SOURCE; a variable has several with commas between.",
    )
    smaller_variant: str = Field(
        "",
        description="Second, smaller form of `model`, which the gateway asks instead while the load is high: int8, "
        "int4-g64 and the like, or a model made elsewhere (docs/quantization.md). Empty: none.",
    )
    host: str = Field("127.0.0.1", description="Address that Triton listens on; 0.0.0.0 for all.")
    http_port: int = Field(8000, ge=1, le=65535, description="Triton's HTTP port.")
    grpc_port: int = Field(8001, ge=1, le=65535, description="Triton's gRPC port.")
    metrics_port: int = Field(8002, ge=1, le=65535, description="Triton's Prometheus metrics port.")
    gateway_port: int = Field(
        8080, ge=0, le=65535, description="Port of the OpenAI-compatible gateway beside Triton, on 127.0.0.1; 0: none."
    )
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
        "weights are loaded (on a GPU less what the largest step takes). auto: 1GiB on a CPU, 90% on a GPU.",
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
    fallback: str = Field(
        "",
        description="Also serve `fallback`, a small ONNX model in a process of its own: auto for the same model, "
        "the name of another, or a folder that `tidewright export-onnx` made; exported if need be. Empty: none.",
    )
    fallback_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where onnxruntime runs the fallback; auto is the CPU, which still works when the GPU does not.",
    )
    fallback_threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of the fallback; 0: as many as CPU affinity and quota allow. They get little where "
        "the main model computes.",
    )
    fallback_memory: str = Field("256MiB", description="Memory of the fallback's KV cache, as kv_cache_memory.")
    fallback_max_tokens: int = Field(
        64, ge=1, description="Longest answer of the fallback; more is cut off with the reason length."
    )
    failsafe_patience: float = Field(
        0.5,
        gt=0,
        le=60,
        description="Seconds without a sign of life from the main model after which the fallback answers.",
    )
    failsafe_first_token_timeout: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="Seconds until the fallback answers a stream without a token, even if the main model is well.",
    )
    failsafe_stall_timeout: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="Seconds after which the fallback goes on with a stream that gets no further token.",
    )
    failsafe_resume: Literal["continue", "fail"] = Field(
        "continue",
        description="A stream that the main model can't end is continued by the fallback, or fails.",
    )
    degradation: bool = Field(
        False, description="Under load, shorten answers, let the fallback answer, and at last refuse: see degrade_..."
    )
    heartbeat_interval: float = Field(0.2, gt=0, le=60, description="Seconds between two heartbeats of the engine.")
    heartbeat_timeout: float = Field(
        30.0, gt=0, description="Seconds without a heartbeat after which the engine is killed and restarted."
    )
    start_timeout: float = Field(120.0, gt=0, description="Seconds the engine may take to load its model.")
    shutdown_grace: float = Field(
        10.0, ge=0, description="Seconds that running requests get to finish after Ctrl-C or SIGTERM."
    )
    log_level: LogLevel = Field("info", description="Minimum log level; debug has lines for each request.")
    log_format: LogFormat = Field("text", description="Format of log lines: text, or one JSON object each.")
    log_file: str = Field("", description="File for the log, which may be rotated. Empty: standard error.")
    otlp_endpoint: OtlpEndpoint = Field(
        "",
        description="Where spans go: http://HOST:4318, an OTLP/HTTP collector, or file:///PATH. Triton's own spans "
        "go to a collector only. Empty: nowhere.",
    )

    @field_validator("kv_cache_memory", "fallback_memory", "memory_budget")
    @classmethod
    def _memory_is_readable(cls, value: str) -> str:
        if value != "auto":
            parse_memory(value, 1)
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

    @property
    def adapter_paths(self) -> dict[str, str]:
        """Of `adapters`, by name."""
        return parse_adapters(self.adapters)

    @model_validator(mode="after")
    def _values_agree(self) -> Settings:
        ports = [self.http_port, self.grpc_port, self.metrics_port, self.gateway_port]
        if len(set(ports)) != len(ports):
            raise ValueError(f"http_port, grpc_port, metrics_port and gateway_port must differ, but are {ports}")
        if self.failsafe_patience < 2 * self.heartbeat_interval:
            raise ValueError("failsafe_patience must be at least twice heartbeat_interval")
        if self.heartbeat_timeout < 2 * self.heartbeat_interval:
            raise ValueError("heartbeat_timeout must be at least twice heartbeat_interval")
        if self.tensor_parallel_size % self.nodes:
            raise ValueError(
                f"tensor_parallel_size is {self.tensor_parallel_size}, which {self.nodes} nodes can't share equally"
            )
        if self.device.startswith("cuda"):
            gpus_of(self.device, self.tensor_parallel_size // self.nodes)
        if (self.nodes > 1) != bool(self.rendezvous):
            raise ValueError("nodes > 1 and rendezvous go together: the other hosts come to HOST:PORT")
        if self.adapters and not self.adapter_folder:
            raise ValueError("adapters need adapter_folder: they are loaded from below it, and from nowhere else")
        if self.rendezvous:
            parse_rendezvous(self.rendezvous)
        for name in ("fallback", "speculative_tokens"):
            if self.task == "embed" and getattr(self, name):
                raise ValueError(f"{name} is for generated text, of which task embed has none; leave it out")
        if self.task != "embed" and (self.pooling != "last" or not self.normalize):
            raise ValueError("pooling and normalize are for embeddings; add task: embed (--task embed)")
        return self

    @model_validator(mode="before")
    @classmethod
    def _has_its_smaller_variant(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not (variant := given.get("smaller_variant")):
            return given
        model = str(given.get("model", EMBEDDED_MODEL))
        name = given.get("served_model_name") or served_name(model)
        own = str(given.get("quantization", ""))
        return {**given, "models": with_smaller_variant(model, name, given.get("models"), str(variant), own)}

    @model_validator(mode="after")
    def _models_agree(self) -> Settings:
        if self.smaller_variant and self.task == "embed":
            raise ValueError("smaller_variant is for models that generate, and task is embed; leave it out")
        if not self.models:
            return self
        check_names(self.model_name, self.models)
        if self.nodes > 1:
            raise ValueError("models beside the first need nodes: 1, for workers serve one model")
        self._shares()
        for one in self.models:
            if unknown := sorted(one.options.keys() - OF_A_MODEL):
                raise ValueError(
                    f"models: {one.name} can't have {unknown[0]} of its own; what a model can have is: "
                    f"{', '.join(OF_A_MODEL)}"
                )
            try:
                self.of(one.name)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"])) or "its options"
                message = first["msg"].removeprefix("Value error, ")
                raise ValueError(f"models: {one.name}: {place}: {message}") from None
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources = (init_settings, env_settings)
        if file := os.environ.get(CONFIG_FILE_VARIABLE):
            options = read_options(Path(file), {"": tuple(settings_cls.model_fields)})
            return (*sources, InitSettingsSource(settings_cls, options))
        return sources

    @property
    def model_name(self) -> str:
        """Of the first model."""
        return self.served_model_name or served_name(self.model)

    @property
    def names(self) -> list[str]:
        """Of all models, loaded or not; the first is first."""
        return [self.model_name, *(one.name for one in self.models)]

    def of(self, name: str) -> Settings:
        """Those of one of the models, as if it were alone but for its part of the memory.

        Raises:
            KeyError: there is no model of that name.
            ValidationError: its own options are wrong, alone or beside the server's.
        """
        share = self._shares()[name]
        if name == self.model_name:
            return self.model_copy(update={"models": [], "kv_cache_share": share})
        found = next(one for one in self.models if one.name == name)
        # For the first alone: adapters that fit it, a fallback, and the failsafe that calls that.
        values = self.model_dump(exclude={"models"}) | {"adapters": ""}
        own = {"model": found.model, "served_model_name": name, "fallback": "", "degradation": False, "models": []}
        own["smaller_variant"] = ""
        made = type(self)(**{**values, "kv_cache_share": 0.0, **found.options, **own})
        return made.model_copy(update={"kv_cache_share": share})

    def _shares(self) -> dict[str, float]:
        """Of the memory, by name. Raises ValueError: there is not enough."""
        given = [self.kv_cache_share, *(_share(one) for one in self.models)]
        left, without = 1 - sum(given), given.count(0)
        if len(given) == 1:
            return {self.model_name: self.kv_cache_share or 1.0}
        if left < -1e-9 or (without and left < 1e-9):
            what = "more than 1" if left < -1e-9 else "all, and leave nothing for the models without one"
            raise ValueError(f"kv_cache_share: the shares of all models are {1 - left:g}, {what}")
        return {name: share or left / without for name, share in zip(self.names, given, strict=True)}

    def in_order(self) -> dict[str, Any]:
        """As the YAML file has them, in the order of help and docs."""
        values = self.model_dump()
        return {name: values[name] for name, _ in options_in_order(type(self))}

    def as_environment(self) -> dict[str, str]:
        """The variables from which the same settings are read again, in Triton's stub processes."""
        values: dict[str, Any] = self.model_dump()
        values["models"] = json.dumps(values["models"])
        return {f"TIDEWRIGHT_{name.upper()}": str(value) for name, value in values.items()}

    def fallback_engine_config(self, model_dir: Path) -> EngineConfig:
        """What the engine process of the fallback needs. `model_dir` is the export."""
        return msgspec.structs.replace(
            self.engine_config(model_dir),
            is_onnx=True,
            device="cpu" if self.fallback_device == "auto" else self.fallback_device,
            threads=self.fallback_threads,
            niceness=10,
            kv_cache_dtype="auto",  # as it was exported
            kv_cache_memory=self.fallback_memory,
            kv_cache_share=1.0,
            memory_budget="auto",
            max_output_tokens=self.fallback_max_tokens,
            adapter_folder="",
            max_batched_tokens=256,  # its prefill is slow, and nobody is to wait long for a first token
            max_running=16,
            ttft_target=0.0,
            tpot_target=0.0,
            prefix_caching=False,
            speculative_tokens=0,
            async_scheduling="off",
            standby=False,
            task="generate",
            tensor_parallel_size=1,
            nodes=1,
            rendezvous="",
            rendezvous_secret_file="",
        )

    def engine_config(self, model_dir: Path) -> EngineConfig:
        """What the engine process needs."""
        return EngineConfig(
            model_dir=str(model_dir),
            device=self.device,
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            quantization=self.quantization,
            quantize_head=self.quantize_head,
            threads=self.threads,
            attention=self.attention,
            block_size=self.block_size,
            kv_cache_memory=self.kv_cache_memory,
            kv_cache_share=self.kv_cache_share or 1.0,
            memory_budget=self.memory_budget,
            max_model_len=self.max_model_len,
            max_batched_tokens=self.max_batched_tokens,
            prefill_step_time=self.prefill_step_time,
            ttft_target=self.ttft_target,
            tpot_target=self.tpot_target,
            max_running=self.max_running,
            max_waiting=self.max_waiting,
            prefix_caching=self.prefix_caching,
            speculative_tokens=self.speculative_tokens,
            async_scheduling=self.async_scheduling,
            task=self.task,
            pooling=self.pooling,
            normalize=self.normalize,
            adapter_folder=self.adapter_folder,
            max_adapters=self.max_adapters,
            max_lora_rank=self.max_lora_rank,
            adapter_memory=self.adapter_memory,
            heartbeat_interval=self.heartbeat_interval,
            heartbeat_timeout=self.heartbeat_timeout,
            start_timeout=self.start_timeout,
            tensor_parallel_size=self.tensor_parallel_size,
            nodes=self.nodes,
            rendezvous=self.rendezvous,
            rendezvous_secret_file=self.rendezvous_secret_file,
        )


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


def _share(model: ServedModel) -> float:
    """As configured; what is no share is found where its options are validated."""
    given = model.options.get("kv_cache_share", 0)
    return float(given) if isinstance(given, int | float) and 0 <= given <= 1 else 0.0


def options_in_order(settings: type[ResilienceSettings]) -> list[tuple[str, FieldInfo]]:
    """As help and docs list them: those that everyone may need first, the policies after."""
    return sorted(settings.model_fields.items(), key=lambda option: option[0] in ResilienceSettings.model_fields)
