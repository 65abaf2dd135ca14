"""How close an export comes to its source: perplexity, agreement of next tokens, and how long answers stay the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tidewright.onnx_export.manifest import Closeness, Report
from tidewright.onnx_export.passages import PASSAGES
from tidewright.onnx_export.session import OnnxDecoder
from tidewright.onnx_export.source import SourceModel

READ, ANSWER = 96, 24
"""Tokens of each passage, and of each answer to its beginning."""


class Reference:
    """The text and what the source makes of it, computed once for all precisions."""

    def __init__(self, source: SourceModel, texts: list[list[int]]) -> None:
        shortest = min(map(len, texts))
        self.texts_BT = np.array([text[:shortest] for text in texts])
        # Of different lengths, so that the batch is padded.
        self.prompts = [text[: max(1, shortest // (2 + row))] for row, text in enumerate(texts)]
        logits_BTV = np.stack([source.logits(row).numpy() for row in self.texts_BT.tolist()])
        self.perplexity = _perplexity(logits_BTV[:, :-1], self.texts_BT[:, 1:])
        self.next_BT = logits_BTV.argmax(axis=-1)
        self.answers = [source.greedy(prompt, ANSWER) for prompt in self.prompts]

    def compare(self, file: Path, size: int, progress: Callable[[int, int], None]) -> Closeness:
        """Reads the text as answers are made: token by token, several sequences at once."""
        decoder = OnnxDecoder(file)
        sequences = decoder.begin(self.texts_BT[:, :1].tolist())
        rows, length = [sequences.logits_BV], self.texts_BT.shape[1]
        for place in range(1, length):
            sequences.add(self.texts_BT[:, place])
            rows.append(sequences.logits_BV)
            progress(place, length)
        logits_BTV = np.stack(rows, axis=1)
        answers = decoder.greedy(self.prompts, ANSWER)
        return Closeness(
            bytes=size,
            perplexity=_perplexity(logits_BTV[:, :-1], self.texts_BT[:, 1:]),
            same_next_token=float((logits_BTV.argmax(axis=-1) == self.next_BT).mean()),
            common_prefix=float(np.mean([_common(*pair) for pair in zip(answers, self.answers, strict=True)])),
        )

    def report(self, models: dict[str, Closeness]) -> Report:
        tokens = self.texts_BT.size
        return Report(tokens=tokens, answer_tokens=ANSWER, source_perplexity=self.perplexity, models=models)


def read_passages(folder: Path, limit: int) -> list[list[int]]:
    """Token ids of the passages, for a model that takes up to `limit`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [tokenizer.encode(text).ids[: min(READ, limit)] for text in PASSAGES]


def _perplexity(logits_BTV: np.ndarray, next_BT: np.ndarray) -> float:
    logits_BTV = logits_BTV.astype(np.float64)
    logits_BTV -= logits_BTV.max(axis=-1, keepdims=True)
    chosen_BT = np.take_along_axis(logits_BTV, next_BT[..., None], axis=-1)[..., 0]
    return float(np.exp((np.log(np.exp(logits_BTV).sum(axis=-1)) - chosen_BT).mean()))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = list(zip(first, second, strict=True))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
