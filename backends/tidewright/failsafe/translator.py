"""Requests for a fallback with other token ids than the decoder's: it gets the text, or a chat in its own ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tidewright.bridge.tensors import decode_text, single
from tidewright.cache import find_prepared
from tidewright.config import Settings
from tidewright.onnx_export.manifest import read_manifest, tokenizer_sha256
from tidewright.resilience.errors import ModelError
from tidewright.resilience.outcome import Outcome
from tidewright.schema import INPUT_IDS, MESSAGES, TEXT_INPUT, SamplingParams
from tidewright.tokenization import InvalidPromptError, Tokenizer

Tensors = dict[str, np.ndarray]


class Translator:
    def __init__(self, folder: Path) -> None:
        """`folder`: of the fallback, with its tokenizer."""
        self._tokenizer = Tokenizer(folder)

    def can(self, tensors: Tensors, sampling: SamplingParams) -> bool:
        """There is a text, and nothing is asked for by token ids of the decoder."""
        has_text = TEXT_INPUT.name in tensors or MESSAGES.name in tensors
        has_ids = sampling.logit_bias or sampling.stop_token_ids or sampling.allowed_token_ids
        return has_text and not has_ids

    def prompt(self, tensors: Tensors) -> Tensors:
        """The prompt as the fallback understands it. Raises ModelError: its chat template doesn't take the messages."""
        messages = single(tensors, MESSAGES.name)
        if messages is None:
            return {TEXT_INPUT.name: tensors[TEXT_INPUT.name]}
        try:
            token_ids = self._tokenizer.encode_chat(decode_text(messages, MESSAGES.name), self._tokenizer.max_model_len)
        except InvalidPromptError as error:
            raise ModelError(f"the fallback: {error}", Outcome.INVALID) from None
        return {INPUT_IDS.name: np.array(token_ids, dtype=np.int32)}


def translator(settings: Settings) -> Translator | None:
    """None if the fallback takes the decoder's token ids, or there is none."""
    manifest = read_manifest(Path(settings.fallback)) if settings.fallback else None
    if manifest is None:  # the model `fallback` says what is wrong with its folder
        return None
    if manifest.source.tokenizer_sha256 == tokenizer_sha256(find_prepared(settings.model)):
        return None
    return Translator(Path(settings.fallback))
