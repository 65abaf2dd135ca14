"""Small tokenizers that fall back to bytes, as SentencePiece's do, and random models of their vocabulary."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers as hf
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from helpers.checkpoints import SIZES, save
from tidewright.cache import MANIFEST
from tidewright.tokenization import Tokenizer

BOS, EOS = 1, 2
INVALID = "\ufffd"
_WORDS = ["▁", "▁▁", "▁Paris", "Paris", "▁is", "▁the", "the", "▁true", "true", "é", "中", "\ufffd"]
_LETTERS = 'abcdefghijklmnopqrstuvwxyzPT{}":,.'
VOCAB = ["<unk>", "<s>", "</s>", "<turn>", *(f"<0x{byte:02X}>" for byte in range(256)), *_WORDS, *_LETTERS]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>{% endfor %}"


def byte(value: int) -> int:
    """The id of a byte token."""
    return token(f"<0x{value:02X}>")


def token(text: str) -> int:
    return VOCAB.index(text)


def byte_tokens(text: str | bytes) -> list[int]:
    return [byte(value) for value in (text.encode() if isinstance(text, str) else text)]


def make_tokenizer(kind: str) -> tokenizers.Tokenizer:
    """`llama` (Llama 2, Mistral), `gemma`, or `metaspace`, which has no byte tokens."""
    vocab = [text for text in VOCAB if kind != "metaspace" or not text.startswith("<0x")]
    # Equal scores: a text becomes as few tokens as can be.
    scores = [(text, -1.0) for text in vocab]
    made = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=kind != "metaspace"))
    if kind == "metaspace":
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        steps: list[Any] = [normalizers.Replace(" ", "▁")]
        if kind == "llama":
            parts.append(decoders.Strip(" ", 1, 0))
            steps.insert(0, normalizers.Prepend("▁"))
        made.decoder, made.normalizer = decoders.Sequence(parts), normalizers.Sequence(steps)
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in vocab[:4]])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return made


def text_behind(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> str:
    """What the tokenizer decodes from both, less the prompt's text; half a character at the end is one U+FFFD.

    The tokenizer itself makes a U+FFFD of each byte in its run.
    """
    text_ids = list(filter(tokenizer.is_text if skip else tokenizer.has_token, output))
    data = bytearray()
    for token_id in reversed(text_ids):
        if token_id not in tokenizer.bytes:
            break
        data.insert(0, tokenizer.bytes[token_id])
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(bytes(data))
    except UnicodeDecodeError:
        return _behind(tokenizer, prompt, output, skip)
    cut = len(decoder.getstate()[0])
    return _behind(tokenizer, prompt, text_ids[: len(text_ids) - cut], skip) + INVALID * bool(cut)


def _behind(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool) -> str:
    before, text = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + output, skip)
    assert text.startswith(before)
    return text[len(before) :]


def save_byte_fallback(folder: Path, config: type[hf.PreTrainedConfig], kind: str = "llama", **options: Any) -> None:
    """A prepared model folder: random weights of that configuration, such a tokenizer and a chat template."""
    sizes = {**SIZES, "vocab_size": -(-len(VOCAB) // 64) * 64, "max_position_embeddings": 1024, "bos_token_id": BOS}
    save(folder, config(**{**sizes, "eos_token_id": EOS, **options}))
    make_tokenizer(kind).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    (folder / MANIFEST).write_text("{}")
