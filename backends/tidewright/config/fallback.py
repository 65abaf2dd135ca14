"""Options of the fallback, and of when it answers (docs/fallback.md, docs/resilience.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, field_validator

from tidewright.config.engine import check_memory


class FallbackSettings(BaseModel):
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

    @field_validator("fallback_memory")
    @classmethod
    def _memory_of_fallback_is_readable(cls, value: str) -> str:
        check_memory(value)
        return value
