"""Greedy decoding by transformers: the independent answer that ours is held against."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = {
    "english": "The lighthouse keeper climbed the stairs and",
    "question": "What is the capital of France?",
    "instruction": "Write a short list of three fruits:\n1.",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "json": '{"name": "Ada", "born": 1815, "languages": [',
    "html": "<html>\n<head><title>Hello</title></head>\n<body>",
    "numbers": "1234 + 5678 = ",
    "decimals": "Pi is 3.14159 and e is 2.71828, so their sum is",
    "chinese": "今天天气很好，我们去公园",
    "japanese": "吾輩は猫である。名前は",
    "korean": "안녕하세요, 저는",
    "emoji": "I love pizza 🍕 and 👩‍👩‍👧‍👦",
    "hebrew": "שלום, מה שלומך היום?",
    "arabic": "مرحبا، كيف حالك",
    "accents": "Voilà, l'été à la plage, où les élèves étudient",
    "cyrillic": "Привет, как дела?",
    "space": " ",
    "newlines": "\n\n\n",
    "one token": "The",
    "special tokens": "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n",
    "punctuation": "... --- !!! ???",
    "mixed": "Order #42: 3× café au lait @ €4.50 → total",
    "long": "The river ran past the old mill and under the bridge. " * 166,
}


class Oracle:
    """transformers' model in float32; answers are remembered."""

    def __init__(self, model_dir: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._answers: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def greedy(self, prompt_ids: list[int], max_tokens: int) -> list[int]:
        """Output ids, including the EOS if it came."""
        key = (tuple(prompt_ids), max_tokens)
        if key not in self._answers:
            ids = torch.tensor([prompt_ids])
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
            )
            self._answers[key] = out[0, len(prompt_ids) :].tolist()
        return self._answers[key]

    def shortfalls(self, prompt_ids: list[int], output_ids: list[int]) -> list[float]:
        """How far the logit of each output token is below the best one, after the tokens before it, in float32."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt_ids + output_ids])).logits[0, len(prompt_ids) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(output_ids)[:, None])[:, 0]
        return (logits.max(dim=-1).values - chosen).tolist()
