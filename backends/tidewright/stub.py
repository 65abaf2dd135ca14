"""What the models of this project share in a stub of Triton, where alone `triton_python_backend_utils` exists."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import numpy as np
import triton_python_backend_utils as pb_utils

from tidewright import logs
from tidewright.config import Settings
from tidewright.errors import InvalidRequestError
from tidewright.parent_death import exit_with_parent
from tidewright.schema import FinishReason
from tidewright.served_models import PARAMETER

MAX_ELEMENTS = 1 << 24  # of a tensor: more than any model's context
# Names in pb_utils.TritonError, which the stub fills in only after models are imported.
_ERROR_CODES: dict[FinishReason, str] = {"invalid": "INVALID_ARG", "cancelled": "CANCELLED"}


def begin(args: Mapping[str, str]) -> Settings:
    """For the beginning of `initialize`, whose argument this is. Returns the settings of the model that it serves."""
    exit_with_parent()
    settings = Settings()
    logs.set_up(args["model_name"], settings.log_format, settings.log_level)
    return settings.of(parameter(args, PARAMETER) or settings.model_name)


def served_names() -> list[str]:
    """Of all models of this server."""
    return Settings().names


def parameter(args: Mapping[str, str], name: str) -> str:
    """A parameter of config.pbtxt; empty if it has none of that name."""
    found = json.loads(args["model_config"]).get("parameters", {}).get(name, {})
    return str(found.get("string_value", ""))


def inputs_of(request: object, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Copies of those of the named inputs that the request has: Triton takes its memory back after `execute`.

    Raises:
        InvalidRequestError: one is too large.
    """
    tensors = ((name, pb_utils.get_input_tensor_by_name(request, name)) for name in names)
    found = {name: tensor.as_numpy() for name, tensor in tensors if tensor is not None}
    for name, values in found.items():
        if values.size > MAX_ELEMENTS:
            raise InvalidRequestError(f"{name} has {values.size} elements, more than the limit of {MAX_ELEMENTS}")
    return {name: np.array(values) for name, values in found.items()}


def text_tensor(name: str, values: list[bytes]) -> object:
    return pb_utils.Tensor(name, np.array(values, dtype=np.object_))


def send_final(sender: object, **content: object) -> None:
    """`content`: output_tensors, or an error."""
    response = pb_utils.InferenceResponse(**content)
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)  # type: ignore[attr-defined]


def send_text(sender: object, text: bytes) -> None:
    send_final(sender, output_tensors=[text_tensor("text_output", [text])])


def send_error(sender: object, message: str, reason: FinishReason) -> None:
    """Triton has one code for several reasons, so the message ends with it."""
    send_final(sender, error=error(f"{message} [{reason}]", _ERROR_CODES.get(reason, "UNAVAILABLE")))


def error(message: str, code: str) -> object:
    """`code`: of pb_utils.TritonError."""
    return pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
