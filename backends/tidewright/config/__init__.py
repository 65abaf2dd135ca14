"""The one configuration object: flags, environment (`TIDEWRIGHT_*`) and a YAML file, validated once at start.

Precedence: flags, then environment, then the YAML file, then the defaults of the groups. `tidewright serve --help`
and docs/configuration.md are made from their fields.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
from pydantic import ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tidewright.config.engine import EngineSettings
from tidewright.config.fallback import FallbackSettings
from tidewright.config.processes import ProcessSettings
from tidewright.config.server import ServerSettings
from tidewright.config_file import sources
from tidewright.engine.messages import EngineConfig
from tidewright.resilience.config import ResilienceSettings
from tidewright.served_models import ServedModel, check_names

CONFIG_FILE_VARIABLE = "TIDEWRIGHT_CONFIG"
OF_ALL_MODELS = (
    "nodes",
    "rendezvous",
    "rendezvous_secret_file",
    "kv_cache_memory",
    "memory_budget",
    "streaming_share",
)
OF_A_MODEL = tuple(name for name in EngineSettings.model_fields if name not in OF_ALL_MODELS)
"""Options that a model beside the first may have of its own."""


class Settings(ResilienceSettings, ProcessSettings, FallbackSettings, EngineSettings, ServerSettings, BaseSettings):
    """Options of `tidewright serve`; each is also `TIDEWRIGHT_<NAME>` and a key of the YAML file.

    pydantic lists the fields of the last base first, as help, docs and file do.
    """

    model_config = SettingsConfigDict(env_prefix="TIDEWRIGHT_", extra="forbid", frozen=True)

    @model_validator(mode="after")
    def _groups_agree(self) -> Settings:
        if self.failsafe_patience < 2 * self.heartbeat_interval:
            raise ValueError("failsafe_patience must be at least twice heartbeat_interval")
        if self.heartbeat_timeout < 2 * self.heartbeat_interval:
            raise ValueError("heartbeat_timeout must be at least twice heartbeat_interval")
        if self.task == "embed" and self.fallback:
            raise ValueError("fallback is for generated text, of which task embed has none; leave it out")
        return self

    @model_validator(mode="after")
    def _models_agree(self) -> Settings:
        if self.smaller_variant and self.task == "embed":
            raise ValueError("smaller_variant is for models that generate, and task is embed; leave it out")
        self._check_adapter_names(self.adapter_paths)
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
                own = self.of(one.name)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"])) or "its options"
                message = first["msg"].removeprefix("Value error, ")
                raise ValueError(f"models: {one.name}: {place}: {message}") from None
            self._check_adapter_names(own.adapter_paths)
        return self

    def _check_adapter_names(self, adapters: Collection[str]) -> None:
        """Raises ValueError: one has the name of a model, which answers to it."""
        if taken := next((name for name in adapters if name in self.names), None):
            raise ValueError(f"adapters: {taken!r} is a model itself; choose another name")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        groups = {"": tuple(settings_cls.model_fields)}
        return sources((init_settings, env_settings), settings_cls, CONFIG_FILE_VARIABLE, groups)

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
            class_targets="",
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
        same = {name: getattr(self, name) for name in EngineConfig.__struct_fields__ if name in Settings.model_fields}
        return EngineConfig(model_dir=str(model_dir), **same | {"kv_cache_share": self.kv_cache_share or 1.0})


def _share(model: ServedModel) -> float:
    """As configured; what is no share is found where its options are validated."""
    given = model.options.get("kv_cache_share", 0)
    return float(given) if isinstance(given, int | float) and 0 <= given <= 1 else 0.0
