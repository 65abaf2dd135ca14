"""Options of the server: which models it serves, under which names, and where it listens."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, model_validator

from tidewright.cache import EMBEDDED_MODEL
from tidewright.served_models import Listed, ServedModel, served_name, with_smaller_variant


class ServerSettings(BaseModel):
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
    def _ports_differ(self) -> ServerSettings:
        ports = [self.http_port, self.grpc_port, self.metrics_port, self.gateway_port]
        if len(set(ports)) != len(ports):
            raise ValueError(f"http_port, grpc_port, metrics_port and gateway_port must differ, but are {ports}")
        return self

    @property
    def model_name(self) -> str:
        """Of the first model."""
        return self.served_model_name or served_name(self.model)

    @property
    def names(self) -> list[str]:
        """Of all models, loaded or not; the first is first."""
        return [self.model_name, *(one.name for one in self.models)]
