"""Triton model `tokenizer`: text or chat messages to token ids, each request of a batch on its own."""

from __future__ import annotations

import numpy as np
import triton_python_backend_utils as pb_utils

from tidewright import stub
from tidewright.bridge.request import check_prompt_length
from tidewright.bridge.tensors import decode_text, single
from tidewright.cache import find_prepared
from tidewright.errors import InvalidRequestError
from tidewright.parent_death import end_within
from tidewright.schema import TOKENIZER_INPUTS
from tidewright.tokenization import InvalidPromptError, Tokenizer

_INPUT_NAMES = tuple(spec.name for spec in TOKENIZER_INPUTS)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        settings = stub.begin(args)
        self._tokenizer = Tokenizer(find_prepared(settings.model))
        self._max_model_len = settings.max_model_len or self._tokenizer.max_model_len

    def execute(self, requests: list) -> list:
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        end_within()

    def _respond(self, request: object) -> object:
        try:
            token_ids = self._tokenize(stub.inputs_of(request, _INPUT_NAMES))
        except (InvalidRequestError, InvalidPromptError) as error:
            return pb_utils.InferenceResponse(error=stub.error(f"{error} [invalid]", "INVALID_ARG"))
        ids = pb_utils.Tensor("input_ids", np.array([token_ids], dtype=np.int32))
        return pb_utils.InferenceResponse(output_tensors=[ids])

    def _tokenize(self, tensors: dict[str, np.ndarray]) -> list[int]:
        if len(tensors) != 1:
            raise InvalidRequestError("send either text_input or messages" + (", not both" if tensors else ""))
        ((name, _),) = tensors.items()
        text = decode_text(single(tensors, name), name)
        encode = self._tokenizer.encode if name == "text_input" else self._tokenizer.encode_chat
        token_ids = encode(text, self._max_model_len)
        if self._max_model_len:
            check_prompt_length(token_ids, self._max_model_len)
        return token_ids
