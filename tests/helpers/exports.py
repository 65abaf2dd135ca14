"""Small exported models: no tokenizer or command is needed to make them."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from helpers.checkpoints import VOCAB
from tidewright.onnx_export.decoder import decoder_graph
from tidewright.onnx_export.session import OnnxDecoder
from tidewright.onnx_export.source import SourceModel
from tidewright.onnx_export.weights import model_tensors, write_model


def exported(folder: Path, int8: bool = False) -> OnnxDecoder:
    """The checkpoint in `folder`, through onnxruntime."""
    source = SourceModel(folder)
    graph = decoder_graph(source.architecture, source.config, int8)
    file, _ = write_model(graph, model_tensors(source.decoder), folder / "model.onnx", lambda done, total: None)
    return OnnxDecoder(file, threads=1)


def save_tokenizer(folder: Path, shift: int = 0) -> None:
    """One token for each character, as many as the small checkpoints have."""
    vocab = {chr(32 + (index + shift) % VOCAB): index for index in range(VOCAB)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=" "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
