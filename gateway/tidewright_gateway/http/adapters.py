"""Endpoints that load and unload LoRA adapters, in vLLM's shape. The work is `replicas/adapters.py`'s."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from starlette.responses import PlainTextResponse

from tidewright.schema import ADAPTER_NAME, MAX_ADAPTER_NAME, MAX_ADAPTER_PATH
from tidewright_gateway.models import Models
from tidewright_gateway.openai.errors import invalid

_Name = Annotated[StrictStr, Field(max_length=MAX_ADAPTER_NAME, pattern=f"^{ADAPTER_NAME}$")]


class LoadAdapterRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    lora_name: _Name
    """How requests call it, as `model`."""
    lora_path: Annotated[StrictStr, Field(min_length=1, max_length=MAX_ADAPTER_PATH)]
    """Its folder on the replicas, absolute or below their `adapter_folder`."""
    base_model_name: Annotated[StrictStr, Field(max_length=128)] | None = None
    """The model that it belongs to, of several. Default: the first."""
    lora_int_id: StrictInt | None = None
    """Of vLLM; it says nothing here."""
    load_inplace: StrictBool = False
    """Of vLLM. true is refused: unload the adapter first, or load the new one by another name."""


class UnloadAdapterRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    lora_name: _Name
    """The name that it was loaded by."""
    lora_int_id: StrictInt | None = None
    """Of vLLM; it says nothing here."""


def make_adapter_router(models: Models) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/load_lora_adapter")
    async def load(request: Request, body: LoadAdapterRequest) -> PlainTextResponse:
        """Loads a LoRA adapter on all replicas, also on those that come later. Requires the role admin."""
        if body.load_inplace:
            message = "load_inplace: an adapter is not replaced while requests use it; unload it first, or load the "
            raise invalid(message + "new one by another lora_name", "load_inplace")
        name, base = body.lora_name, models.base(body.base_model_name, "base_model_name")
        if name in models.names:
            raise invalid(f"lora_name: {name!r} is a model itself; choose another name", "lora_name")
        if (other := models.adapters.get(name)) and other is not base:
            message = f"the model {other.name} has a LoRA adapter {name!r}; choose another lora_name"
            raise invalid(message, "lora_name", "adapter_exists")
        await base.failover.adapters.load(name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload(request: Request, body: UnloadAdapterRequest) -> PlainTextResponse:
        """Unloads a LoRA adapter from all replicas: requests that have it finish, new ones get a 404. Requires the
        role admin."""
        model = models.adapters.get(body.lora_name, models.first)
        await model.failover.adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router
