"""How close a quantized model comes to the model that it was made from: both read a text and answer its questions."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import torch

from tidewright.engine.model_runner import ModelRunner

WINDOW = 512  # tokens that are read at once, and the longest context
_ROWS = 128  # logits of a large vocabulary take much memory
PROMPT, ANSWER = 32, 32
CONTEXT, CONTINUATION, CHOICES = 48, 12, 4


class Extent(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    tokens: int = 1 << 20  # of the text, at most
    questions: int = 100
    answers: int = 16


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    tokens: int
    perplexity: float
    source_perplexity: float
    divergence: float
    """KL divergence of the next token's distribution from the source's, on average over the text, in nats."""
    same_next_token: float
    """Share of positions after which both find the same token the most likely."""
    same_answer: float
    """Tokens of greedy answers that are the same before the first that differs, on average; up to ANSWER."""
    right_choices: float
    """Share of questions whose right continuation is the most likely of four."""
    source_right_choices: float
    prompt_speed: float
    """Tokens a second, of the text; a measurement."""
    decode_speed: float
    source_prompt_speed: float
    source_decode_speed: float


@dataclass(frozen=True)
class Question:
    """Which of four stretches of a text comes next? The others are from elsewhere in it."""

    context: list[int]
    choices: list[list[int]]  # the right one is the first


@dataclass
class _Sums:
    """Of one model, over what it was asked so far."""

    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    same: int = 0
    right: int = 0
    prefix: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0


def measure(
    source: ModelRunner,
    others: Mapping[str, ModelRunner],
    token_ids: list[int],
    extent: Extent,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Quality]:
    """Of all others, beside the source. `on_progress` hears parts that are done, and of how many."""
    text = token_ids[: extent.tokens]
    windows = [text[first : first + WINDOW] for first in range(0, len(text) - 1, WINDOW)]
    asked, prompts = questions(token_ids, extent.questions), _spread(token_ids, extent.answers, PROMPT)
    done, total = 0, len(windows) + len(asked) // 4 + len(prompts)
    runners, sums = [source, *others.values()], [_Sums() for _ in range(1 + len(others))]
    for window in windows:
        _read(runners, window, sums)
        on_progress(done := done + 1, total)
    for number, question in enumerate(asked):
        for runner, own in zip(runners, sums, strict=True):
            own.right += answer(runner, question) == 0
        if number % 4 == 3:
            on_progress(done := done + 1, total)
    for prompt in prompts:
        answers = [greedy(runner, prompt) for runner in runners]
        for (tokens, seconds), own in zip(answers, sums, strict=True):
            own.prefix += _common(tokens, answers[0][0])
            own.decode_seconds += seconds
        on_progress(done := done + 1, total)
    decoded = len(prompts) * (ANSWER - 1)
    first = sums[0]
    return {
        name: Quality(
            tokens=own.tokens,
            perplexity=math.exp(own.loss / own.tokens),
            source_perplexity=math.exp(first.loss / first.tokens),
            divergence=own.divergence / own.tokens,
            same_next_token=own.same / own.tokens,
            same_answer=own.prefix / max(len(prompts), 1),
            right_choices=own.right / max(len(asked), 1),
            source_right_choices=first.right / max(len(asked), 1),
            prompt_speed=own.tokens / own.prompt_seconds,
            source_prompt_speed=first.tokens / first.prompt_seconds,
            decode_speed=decoded / own.decode_seconds if decoded else 0.0,
            source_decode_speed=decoded / first.decode_seconds if decoded else 0.0,
        )
        for name, own in zip(others, sums[1:], strict=True)
    }


def _read(runners: list[ModelRunner], window: list[int], sums: list[_Sums]) -> None:
    """The source is the first of both."""
    logits = []
    for runner, own in zip(runners, sums, strict=True):
        began = time.perf_counter()
        logits.append(runner.logits(window, 0, slice(0, len(window) - 1)))
        own.prompt_seconds += time.perf_counter() - began
        own.tokens += len(window) - 1
    following = torch.tensor(window[1:])
    for first in range(0, len(following), _ROWS):
        rows, chosen_T1 = slice(first, first + _ROWS), following[first : first + _ROWS, None]
        source_TV = logits[0][rows].float().log_softmax(dim=-1)
        for some_TV, own in zip(logits, sums, strict=True):
            own_TV = some_TV[rows].float().log_softmax(dim=-1)
            own.loss -= float(own_TV.gather(1, chosen_T1).sum())
            own.same += int((source_TV.argmax(dim=-1) == own_TV.argmax(dim=-1)).sum())
            own.divergence += float((source_TV.exp() * (source_TV - own_TV)).sum())


def questions(token_ids: list[int], count: int) -> list[Question]:
    """At equal distances in the text; the same ones every time."""
    chance, length = random.Random(0), CONTEXT + CONTINUATION
    last = len(token_ids) - length
    made: list[Question] = []
    for first in range(0, max(last, 0), max(last // max(count, 1), 1)):
        place = first + CONTEXT
        far = [start for start in (chance.randrange(last) for _ in range(100)) if abs(start - place) > 2 * length]
        starts = [place, *far[: CHOICES - 1]]
        if len(made) == count or len(starts) < CHOICES:
            break
        made.append(Question(token_ids[first:place], [token_ids[start : start + CONTINUATION] for start in starts]))
    return made


def answer(runner: ModelRunner, question: Question) -> int:
    """The number of the likeliest choice."""
    count = len(question.context)
    first_V = runner.logits(question.context, 0, slice(count - 1, count))[0].float().log_softmax(dim=-1)
    scores = []
    for choice in question.choices:
        logprobs_TV = runner.logits(choice, count, slice(0, len(choice) - 1)).float().log_softmax(dim=-1)
        rest = logprobs_TV.gather(1, torch.tensor(choice[1:])[:, None]).sum()
        scores.append(float(first_V[choice[0]] + rest))
    return scores.index(max(scores))


def greedy(runner: ModelRunner, prompt: list[int]) -> tuple[list[int], float]:
    """Tokens, and the seconds that all but the first have taken."""
    last = len(prompt) - 1
    tokens = [int(runner.logits(prompt, 0, slice(last, last + 1)).argmax())]
    began = time.perf_counter()
    while len(tokens) < ANSWER:
        tokens.append(int(runner.logits(tokens[-1:], last + len(tokens), slice(0, 1)).argmax()))
    return tokens, time.perf_counter() - began


def _spread(token_ids: list[int], count: int, length: int) -> list[list[int]]:
    step = max((len(token_ids) - length) // max(count, 1), 1)
    return [token_ids[first : first + length] for first in range(0, len(token_ids) - length, step)][:count]


def _common(first: list[int], second: list[int]) -> int:
    return next((place for place, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), len(first))
