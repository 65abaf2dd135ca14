"""A Hugging Face tokenizer from the metadata of a GGUF file: byte-level BPE, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tidewright.launch.errors import UnsupportedModelError

# Values of tokenizer.ggml.token_type, as llama.cpp numbers them.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split_like_llama3(digits: str) -> pre_tokenizers.PreTokenizer:
    """Llama 3 and Qwen 2 split alike but for how many `digits` go into one piece."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# By tokenizer.ggml.pre. llama.cpp's "default" is not here: it only says that the converter knew no better.
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _digits_then_gpt2,
    "gpt-2": _gpt2,
    "llama-bpe": lambda: _split_like_llama3(r"\p{N}{1,3}"),
    "qwen2": lambda: _split_like_llama3(r"\p{N}"),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes.

    Raises:
        UnsupportedModelError: another tokenizer model than byte-level BPE, or an unknown way to split text.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise UnsupportedModelError(
            f"the GGUF file has a tokenizer of kind {kind!r}; only byte-level BPE ('gpt2') can be converted. "
            "Prepare the model's Hugging Face folder instead."
        )
    if pre not in _PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"the GGUF file splits text by {pre!r} (tokenizer.ggml.pre); known are "
            f"{', '.join(sorted(_PRE_TOKENIZERS))}. Prepare the model's Hugging Face folder instead."
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            # Llama 3 was trained with whole-word tokens that no chain of merges reaches.
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, types, strict=False)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    bos = _token(metadata, "bos")
    # Files of Llama 3 leave the flag out and mean "yes".
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", bos, "$B:1"],
            special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])],
        )
    return tokenizer


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _token(metadata, "bos"),
        "eos_token": _token(metadata, "eos"),
        "unk_token": _token(metadata, "unknown"),
        "pad_token": _token(metadata, "padding"),
        "chat_template": metadata.get("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
    }
    present = {key: value for key, value in config.items() if value is not None}
    text = json.dumps(present, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _token(metadata: Mapping[str, Any], role: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return None if index is None else metadata["tokenizer.ggml.tokens"][index]
