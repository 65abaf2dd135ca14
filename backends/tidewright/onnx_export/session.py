"""Runs an exported model through onnxruntime: a batch of sequences, padded on the left, and their cache. No torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from tidewright.cores import usable_threads

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

logger = logging.getLogger(__name__)


Past = list[np.ndarray]
"""Keys and values of all layers: [B, K, C, D] each, C cached positions."""


class OnnxModelError(ValueError):
    """The file is not a model that can run here."""


class OnnxDecoder:
    """Raises OnnxModelError. `threads`: 0 for as many as this process can keep busy.

    `device`: cpu; cuda, or auto, for the GPU if this onnxruntime can use it, else the CPU.
    """

    def __init__(self, file: Path, threads: int = 0, device: str = "cpu") -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or usable_threads()
        # Threads that wait for work would take the time of those that have some.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=_providers(device))
        except Exception as error:  # onnxruntime's own types have no common base of their own
            raise OnnxModelError(f"{file} can't be run: {str(error).strip().splitlines()[-1]}") from error
        self.device = "cuda" if self._session.get_providers()[0] == _CUDA else "cpu"
        self._past = {value.name: value.shape for value in self._session.get_inputs()[3:]}

    def empty_past(self, batch: int) -> Past:
        """Of no position yet."""
        return [np.zeros((batch, heads, 0, head_dim), np.float32) for _, heads, _, head_dim in self._past.values()]

    def begin(self, prompts: Sequence[Sequence[int]]) -> Sequences:
        """Reads the prompts, which may differ in length."""
        longest = max(map(len, prompts))
        ids_BT, mask_BT = np.zeros((2, len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids_BT[row, longest - len(prompt) :] = prompt
            mask_BT[row, longest - len(prompt) :] = 1
        sequences = Sequences(self, self.empty_past(len(prompts)), mask_BT[:, :0])
        sequences.read(ids_BT, mask_BT)
        return sequences

    def join(self, pasts: Sequence[Past]) -> Sequences:
        """Sequences of one row each, which may differ in length, as rows of one."""
        lengths = [past[0].shape[2] for past in pasts]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        mask_BC = (np.arange(longest) >= np.array(padding)[:, None]).astype(np.int64)
        if len(pasts) == 1:
            return Sequences(self, pasts[0], mask_BC)
        joined = [
            np.concatenate(
                [np.pad(x, ((0, 0), (0, 0), (front, 0), (0, 0))) for x, front in zip(rows, padding, strict=True)]
            )
            for rows in zip(*pasts, strict=True)
        ]
        return Sequences(self, joined, mask_BC)

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        sequences = self.begin(prompts)
        tokens = [sequences.logits_BV.argmax(axis=-1)]
        while len(tokens) < count:
            sequences.add(tokens[-1])
            tokens.append(sequences.logits_BV.argmax(axis=-1))
        answers: list[list[int]] = np.stack(tokens, axis=1).tolist()
        return answers

    def run(
        self, ids_BT: np.ndarray, mask_BC: np.ndarray, positions_BT: np.ndarray, past: Past
    ) -> tuple[np.ndarray, Past]:
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BC, "position_ids": positions_BT}
        logits_BV, *present = self._session.run(None, inputs | dict(zip(self._past, past, strict=True)))
        return logits_BV, present


def _providers(device: str) -> list[str]:
    available = onnxruntime.get_available_providers()
    if device != "cpu" and _CUDA in available:
        return [_CUDA, _CPU]
    if device.startswith("cuda"):
        logger.warning(
            "this onnxruntime has no %s (it has %s), so the CPU runs the model; install onnxruntime-gpu",
            _CUDA,
            ", ".join(available),
        )
    return [_CPU]


class Sequences:
    """Sequences that grow together, padded on the left; padding is masked, so none sees another's length.

    `logits_BV` are those after their last tokens, once something was read.
    """

    def __init__(self, decoder: OnnxDecoder, past: Past, mask_BC: np.ndarray) -> None:
        self._decoder, self._past, self._mask_BC = decoder, past, mask_BC

    def add(self, token_ids_B: np.ndarray | Sequence[int]) -> None:
        """One more token for each."""
        ids_B1 = np.asarray(token_ids_B, dtype=np.int64)[:, None]
        self.read(ids_B1, np.ones_like(ids_B1))

    def read(self, ids_BT: np.ndarray, mask_BT: np.ndarray) -> None:
        """More tokens for each; where the mask is 0, only before a sequence's first token, there is none."""
        self._mask_BC = np.concatenate([self._mask_BC, mask_BT], axis=1)
        # Padding counts for nothing; its own position only has to exist.
        positions_BC = np.maximum(self._mask_BC.cumsum(axis=1) - 1, 0)
        positions_BT = positions_BC[:, -ids_BT.shape[1] :]
        self.logits_BV, self._past = self._decoder.run(ids_BT, self._mask_BC, positions_BT, self._past)

    def past_of(self, row: int) -> Past:
        """Views of one sequence, without its padding."""
        padding = np.count_nonzero(self._mask_BC[row] == 0)
        return [array[row : row + 1, :, padding:] for array in self._past]
