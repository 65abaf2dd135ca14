"""Endpoints that load and unload LoRA adapters, in vLLM's shape. The work is `replicas/adapters.py`'s."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StrictStr
from starlette.responses import PlainTextResponse

from tidewright_gateway.config import GatewaySettings
from tidewright_gateway.openai.errors import invalid
from tidewright_gateway.replicas.adapters import Adapters

_Name = Annotated[StrictStr, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$")]


class LoadAdapterRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    lora_name: _Name
    """How requests call it, as `model`."""
    lora_path: Annotated[StrictStr, Field(min_length=1, max_length=4096)]
    """Its folder on the replicas, absolute or below their `adapter_folder`."""


class UnloadAdapterRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    lora_name: _Name
    """The name that it was loaded by."""


def make_adapter_router(settings: GatewaySettings, adapters: Adapters) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/load_lora_adapter")
    async def load(request: Request, body: LoadAdapterRequest) -> PlainTextResponse:
        """Loads a LoRA adapter on all replicas, also on those that come later. Requires the role admin."""
        if body.lora_name == settings.model_name:
            raise invalid(f"lora_name: {body.lora_name!r} is the model itself; choose another name", "lora_name")
        await adapters.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload(request: Request, body: UnloadAdapterRequest) -> PlainTextResponse:
        """Unloads a LoRA adapter from all replicas: requests that have it finish, new ones get a 404. Requires the
        role admin."""
        await adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router
