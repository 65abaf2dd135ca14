"""Greedy decoding by transformers: the independent answer that ours is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
    "long": "The river ran past the old mill and under the bridge. " * 90,
}


class Oracle:
    """transformers' model in float32; answers are remembered."""

    def __init__(self, model_dir: Path) -> None:
        # Here, as they take seconds, and most runs of a few tests need no oracle.
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._answers: dict[tuple[int, ...], list[int]] = {}  # the longest to each prompt
        self._eos = self._model.generation_config.eos_token_id

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def greedy(self, prompt_ids: list[int], max_tokens: int, guess: Sequence[int] = ()) -> list[int]:
        """Output ids, including the EOS if it came. A `guess` whose beginning is right changes the time and no more."""
        answer = self._answers.setdefault(tuple(prompt_ids), [])
        if self._eos not in answer:
            answer += self._confirmed(prompt_ids + answer, guess[len(answer) : max_tokens])
        if len(answer) < max_tokens and self._eos not in answer:
            ids = self._torch.tensor([prompt_ids + answer])
            out = self._model.generate(
                ids, attention_mask=self._torch.ones_like(ids), max_new_tokens=max_tokens - len(answer), do_sample=False
            )
            answer += out[0, ids.shape[1] :].tolist()
        return answer[:max_tokens]

    def _confirmed(self, ids: list[int], guess: Sequence[int]) -> list[int]:
        """How the guess begins that is greedy: in one pass, where `generate` takes one for each token."""
        if not guess:
            return []
        with self._torch.inference_mode():
            logits_TV = self._model(self._torch.tensor([[*ids, *guess]]), logits_to_keep=len(guess) + 1).logits[0, :-1]
        confirmed: list[int] = []
        for best, token in zip(logits_TV.argmax(dim=-1).tolist(), guess, strict=True):
            if best != token or self._eos in confirmed:
                break
            confirmed.append(token)
        return confirmed

    def shortfalls(self, prompt_ids: list[int], output_ids: list[int]) -> list[float]:
        """How far the logit of each output token is below the best one, after the tokens before it, in float32."""
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([prompt_ids + output_ids])).logits[0, len(prompt_ids) - 1 : -1]
        chosen = logits.gather(-1, self._torch.tensor(output_ids)[:, None])[:, 0]
        return (logits.max(dim=-1).values - chosen).tolist()

    def logprobs(self, ids: list[int]) -> list[float]:
        """The log-probability of each token but the first, after those before it."""
        with self._torch.inference_mode():
            logprobs = self._model(self._torch.tensor([ids])).logits[0, :-1].log_softmax(dim=-1)
        return logprobs.gather(-1, self._torch.tensor(ids[1:])[:, None])[:, 0].tolist()
